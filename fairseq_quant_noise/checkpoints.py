"""fairseq's loading of checkpoints, made safe, and taught to read the packed file.

Nothing untrusted is unpickled: `torch.load(weights_only=True)` with an allow-list of what fairseq itself writes.
A refusal names the global and what to do; there is no unsafe fallback.
"""

import argparse
import re
from pathlib import Path
from typing import Any

import fairseq.checkpoint_utils
import torch
from fairseq.file_io import PathManager
from omegaconf import OmegaConf

from .cli_errors import exits_on_user_error
from .errors import UserError

#: What fairseq's checkpoints hold besides tensors and plain containers.
ALLOWED = [argparse.Namespace]

_upgrade_state_dict = fairseq.checkpoint_utils._upgrade_state_dict
_overwrite_args_by_name = fairseq.checkpoint_utils.overwrite_args_by_name


def safe_load(path: str | Path) -> dict[str, Any]:
    """The content of a fairseq checkpoint, on the CPU.

    Raises:
        UserError: no such file, not a checkpoint, or one that holds anything outside the allow-list.
    """
    try:
        with torch.serialization.safe_globals(ALLOWED):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"checkpoint {path}: {error.strerror}; give the path of a checkpoint") from None
    except Exception as error:  # torch raises UnpicklingError, RuntimeError, EOFError, ... for a file it cannot read
        raise UserError(_refusal(path, str(error))) from None
    if not isinstance(state, dict) or "model" not in state:
        raise UserError(f"checkpoint {path}: has no 'model'; give a checkpoint that fairseq-train wrote")
    return state


def _refusal(path: str | Path, message: str) -> str:
    found = re.search(r"GLOBAL ([\w.]+)|Unsupported (?:class|global):? ?([\w.]+)", message)
    if found is None:
        return f"checkpoint {path}: not a whole PyTorch checkpoint; copy or download it again"
    name = found.group(1) or found.group(2)
    return (
        f"checkpoint {path}: refused, its pickle calls for {name}, which could run code; if you trust the file, load it "
        "once with torch.load(path, weights_only=False), keep its 'model' and 'args' or 'cfg', and save it again"
    )


def is_packed(path: str | Path) -> bool:
    """Whether `path` names a packed file, by its ending."""
    return str(path).endswith(".safetensors")


def load_checkpoint_to_cpu(path: str, arg_overrides: Any = None, load_on_all_ranks: bool = False) -> dict[str, Any]:
    """What fairseq's function of this name returns, for a checkpoint or a packed file.

    Args:
        path: of a checkpoint, or of a packed file (`.safetensors`).
        arg_overrides: values to set in the configuration, by name.
        load_on_all_ranks: as in fairseq; a local path needs no barrier.
    """
    path = PathManager.get_local_path(path)
    with exits_on_user_error():
        if is_packed(path):
            return _with_overrides(packed_state(path), arg_overrides)
        return _upgrade_state_dict(_with_overrides(safe_load(path), arg_overrides))


def _with_overrides(state: dict[str, Any], arg_overrides: Any) -> dict[str, Any]:
    if state.get("args") is not None and arg_overrides is not None:
        vars(state["args"]).update(arg_overrides)
    if state.get("cfg") is not None:
        state["cfg"] = OmegaConf.create(state["cfg"], flags={"allow_objects": True})
        if arg_overrides is not None:
            _overwrite_args_by_name(state["cfg"], arg_overrides)
    return state


def packed_state(path: str | Path) -> dict[str, Any]:
    """A packed file as the state that fairseq's loading expects: configuration and (quantized) model."""
    from .artifact import read

    packed = read(path)
    config = packed.manifest.model
    if "cfg" not in config:
        raise UserError(f"{path}: was saved without a fairseq configuration; load it with fairseq_quant_noise.load")
    return {
        "args": None,
        "cfg": config["cfg"],
        "model": packed.state_dict(),
        "optimizer_history": [],
        "extra_state": {},
        "task_state": {},
    }


def install() -> None:
    """Make fairseq's programs load through this module."""
    fairseq.checkpoint_utils.load_checkpoint_to_cpu = load_checkpoint_to_cpu
