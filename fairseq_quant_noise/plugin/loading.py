"""Load checkpoints for fairseq safely, and packed files too.

Nothing untrusted is unpickled (`checkpoints/safe_load.py`).
"""

import logging
from argparse import Namespace
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import fairseq.checkpoint_utils
import fairseq.distributed.utils
from fairseq.criterions import CRITERION_REGISTRY
from fairseq.data import Dictionary
from fairseq.dataclass.configs import GenerationConfig
from fairseq.dataclass.utils import merge_with_parent
from fairseq.file_io import PathManager
from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_DATACLASS_REGISTRY, MODEL_REGISTRY
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..artifact import Packed, read
from ..artifact.configuration import check_evaluated
from ..artifact.network import check_network
from ..artifact.reader import is_packed
from ..checkpoints.dictionaries import SavedDictionary
from ..checkpoints.keys import no_training
from ..checkpoints.options import SECTIONS, as_fairseq, default_criterion
from ..checkpoints.safe_load import safe_load
from ..errors import DamagedFileError, UserError
from ..networks.registry import PREFIX, stock_name
from .exits import exits_on_user_error

logger = logging.getLogger(__name__)

_upgrade_state_dict = fairseq.checkpoint_utils._upgrade_state_dict
_overwrite_args_by_name = fairseq.checkpoint_utils.overwrite_args_by_name


_USUAL_CRITERION = {
    "masked_lm": "masked_lm",
    "sentence_prediction": "sentence_prediction",
    "language_modeling": "cross_entropy",
    "translation": "label_smoothed_cross_entropy",
}

#: Sections of the configuration that `from_pretrained` reads or sets.
_FOR_THE_HUB = {
    "bpe": None,
    "tokenizer": None,
    "generation": asdict(GenerationConfig()),
    "dataset": {"max_tokens": None, "batch_size": None},
}


def load_checkpoint_to_cpu(path: str, arg_overrides: Any = None, load_on_all_ranks: bool = False) -> dict[str, Any]:
    """What fairseq's function of this name returns, for a checkpoint or a packed file.

    Args:
        path: of a checkpoint, or of a packed file (`.safetensors`).
        arg_overrides: values to set in the configuration, by name.
        load_on_all_ranks: as in fairseq; a local path needs no barrier.

    Raises:
        UserError: as `load_state`; in fairseq's programs SystemExit, after one line.
    """
    with exits_on_user_error():
        return load_state(path, arg_overrides)


def load_state(path: str | Path, arg_overrides: Any = None) -> dict[str, Any]:
    """As `load_checkpoint_to_cpu`, for callers in Python.

    Args:
        path: of a checkpoint, or of a packed file (`.safetensors`).
        arg_overrides: values to set in the configuration, by name.

    Raises:
        UserError: the file cannot be read, or is of another kind.
        DamagedFileError: the file is not whole, or holds anything outside the allow-list.
    """
    path = PathManager.get_local_path(str(path))
    if is_packed(path):
        return _with_overrides(packed_state(path), arg_overrides)
    return upgraded(path, safe_load(path), arg_overrides)


def upgraded(path: str | Path, state: dict[str, Any], arg_overrides: Any = None) -> dict[str, Any]:
    """Upgrade a checkpoint's content to the form of fairseq 0.12, whatever version wrote it; `state` is changed.

    Args:
        path: of the checkpoint, for messages.
        state: as `safe_load` reads it.
        arg_overrides: as in `load_state`.

    Raises:
        DamagedFileError: fairseq cannot read the configuration, or would run what is in it.
    """
    if isinstance(state.get("task_state"), dict):
        state["task_state"] = {name: _of_fairseq(value) for name, value in state["task_state"].items()}
    _check_options(path, state)
    _rename_unknown(path, state)
    try:
        return _upgrade_state_dict(_with_overrides(_with_history(state), arg_overrides))
    except Exception as error:  # fairseq, Hydra and omegaconf have many; the configuration may hold anything
        reason = (str(error).splitlines() or [""])[0]
        raise DamagedFileError(
            f"checkpoint {path}: fairseq cannot read its configuration ({type(error).__name__}: {reason})"
        ) from None


def _of_fairseq(value: Any) -> Any:
    """Replace each SavedDictionary, alone or in a list, by fairseq's Dictionary; any other value stays."""
    if isinstance(value, list):
        return [*map(_of_fairseq, value)] if any(isinstance(item, SavedDictionary) for item in value) else value
    if not isinstance(value, SavedDictionary):
        return value
    dictionary = Dictionary.__new__(Dictionary)
    vars(dictionary).update(value.fields)
    return dictionary


def _rename_unknown(path: str | Path, state: dict[str, Any]) -> None:
    """Give a known name to an architecture and a criterion of a plugin that is not here, in place.

    An architecture only sets defaults of options, all of which are recorded. The criterion becomes the usual one of the
    task, with a warning: the loss is then another.
    """
    cfg, args = state.get("cfg") or {}, state.get("args")
    for options in filter(None, (args, cfg.get("model"))):
        given = options if isinstance(options, dict) else vars(options)
        for key in ("arch", "_name"):
            name = given.get(key)
            if isinstance(name, str) and name not in ARCH_MODEL_REGISTRY and name not in MODEL_REGISTRY:
                with suppress(UserError):  # fairseq says that it does not know the model
                    given[key] = stock_name(path, name)
    criterion = cfg.get("criterion")
    if args is not None:
        args.criterion = _known_criterion(path, getattr(args, "criterion", None), getattr(args, "task", None))
    elif isinstance(criterion, dict) and isinstance(cfg.get("task"), dict):
        name = _known_criterion(path, criterion.get("_name"), cfg["task"].get("_name"))
        cfg["criterion"] = criterion if name == criterion.get("_name") else default_criterion(name)


def _known_criterion(path: str | Path, name: Any, task: Any) -> Any:
    """The criterion's name; where it is unknown, that of the usual criterion of the task, if there is one."""
    if not isinstance(name, str) or name in CRITERION_REGISTRY or task not in _USUAL_CRITERION:
        return name
    usual = _USUAL_CRITERION[task]
    logger.warning(f"{path}: was trained with --criterion {name}, which is not here; {usual} stands for it")
    return usual


def _check_options(path: str | Path, state: dict[str, Any]) -> None:
    """Refuse code in options that fairseq gives to eval(); `literals` guards any that are not listed."""
    for options in ((state.get("cfg") or {}).get("model"), state.get("args")):
        try:
            check_evaluated(options if isinstance(options, dict) else vars(options or Namespace()))
        except DamagedFileError as error:
            raise DamagedFileError(f"checkpoint {path}: refused, {error}") from None


def _with_history(state: dict[str, Any]) -> dict[str, Any]:
    """Add what fairseq reads and a checkpoint lacks that was saved again with model and configuration alone."""
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
    """Read a packed file as the state that fairseq's loading expects: configuration and (quantized) model.

    Raises:
        UserError: the file cannot be read, has no fairseq configuration, or has other tensors than the network that
            its configuration describes.
        DamagedFileError: the file is not whole, or its configuration describes no network.
    """
    packed = read(path)
    config = packed.manifest.model
    if "cfg" not in config:
        raise UserError(f"{path}: was saved without a fairseq configuration; load it with fairseq_quant_noise.load")
    _check_network(path, packed)
    sections = {name: config["cfg"][name] for name in SECTIONS if name in config["cfg"]}
    state = {
        "args": None,
        "cfg": {**_FOR_THE_HUB, **as_fairseq(sections)},
        "model": packed.state_dict(),
        **no_training(),
        "task_state": {"classes": config["classes"]} if config.get("classes") else {},
    }
    _rename_unknown(path, state)
    return state


def _check_network(path: str | Path, packed: Packed) -> None:
    """Refuse a file whose configuration does not fit its tensors, before fairseq builds what it describes.

    Raises:
        UserError: the file has other tensors than the network that its configuration describes.
        DamagedFileError: the configuration names no model of this package, or its options are not valid.
    """
    name = packed.manifest.model["cfg"].get("model", {}).get("_name")
    if not isinstance(name, str) or not name.startswith(PREFIX):
        raise DamagedFileError(f"{path}: its configuration is damaged (model {name!r} is none of a packed file's)")
    check_network(path, packed)
    try:
        options = OmegaConf.create({"model": packed.manifest.model["cfg"]["model"]}).model
        if name in MODEL_DATACLASS_REGISTRY:
            merge_with_parent(MODEL_DATACLASS_REGISTRY[name](), options, remove_missing=True)
    except (OmegaConfBaseException, AssertionError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DamagedFileError(f"{path}: its configuration is damaged ({reason})") from None
