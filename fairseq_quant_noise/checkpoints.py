"""fairseq's loading of checkpoints, made safe, and taught to read the packed file.

Nothing untrusted is unpickled (`safe_load.py`).
"""

from pathlib import Path
from typing import Any

import fairseq.checkpoint_utils
import fairseq.distributed.utils
import torch
from fairseq.file_io import PathManager
from omegaconf import OmegaConf

from .cli_errors import exits_on_user_error
from .errors import UserError
from .safe_load import safe_load
from .stock import no_training

_upgrade_state_dict = fairseq.checkpoint_utils._upgrade_state_dict
_overwrite_args_by_name = fairseq.checkpoint_utils.overwrite_args_by_name


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
    with exits_on_user_error():
        return load_state(path, arg_overrides)


def load_state(path: str | Path, arg_overrides: Any = None) -> dict[str, Any]:
    """As `load_checkpoint_to_cpu`, for callers in Python.

    Args:
        path: of a checkpoint, or of a packed file (`.safetensors`).
        arg_overrides: values to set in the configuration, by name.

    Raises:
        UserError: no such file, or one of another kind.
        DamagedFileError: a file that is not whole, or holds anything outside the allow-list.
    """
    path = PathManager.get_local_path(str(path))
    if is_packed(path):
        return _with_overrides(packed_state(path), arg_overrides)
    return _upgrade_state_dict(_with_overrides(_with_history(safe_load(path)), arg_overrides))


def _with_history(state: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint that was saved again with its model and configuration alone lacks what fairseq looks into."""
    if not state.get("optimizer_history") and "best_loss" not in state:
        state["optimizer_history"] = no_training()["optimizer_history"]
    if state.get("extra_state") is None and "epoch" not in state:
        state["extra_state"] = no_training()["extra_state"]
    return state


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
        "cfg": {"bpe": None, **config["cfg"]},  # the hub's interface sets it
        "model": packed.state_dict(),
        **no_training(),
        "task_state": {"classes": config["classes"]} if config.get("classes") else {},
    }


def broadcast_object(obj: Any, src_rank: int, group: Any, dist_device: torch.device) -> Any:
    """What fairseq's `_broadcast_object_slow` returns: `obj` of rank `src_rank`, on every rank.

    fairseq sends what rank 0 has loaded through torch.save and torch.load, which refuses its configuration since torch
    2.6, so that no checkpoint loads on several processes. The other ranks are this program: what they send is trusted.
    """
    box = [obj]
    torch.distributed.broadcast_object_list(box, src=src_rank, group=group, device=dist_device)
    return box[0]


def install() -> None:
    """Make fairseq's programs load through this module."""
    fairseq.checkpoint_utils.load_checkpoint_to_cpu = load_checkpoint_to_cpu
    fairseq.distributed.utils._broadcast_object_slow = broadcast_object
