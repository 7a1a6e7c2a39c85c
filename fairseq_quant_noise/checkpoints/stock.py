"""Back to stock fairseq: a checkpoint that loads without this package, with the same score."""

import copy
import io
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..artifact import dense_state, read
from ..networks.registry import OF_IMAGES, PREFIX, stock_name
from ..networks.timm_weights import timm_names
from ..utils.files import replace_file
from .options import (
    EMBEDDING_LAYER,
    FAIRSEQ_NOISE_OPTIONS,
    NOISE_FLAGS,
    STRUCTURE_OPTIONS,
    as_fairseq,
    find_embedding_layer,
    unwrapped,
)
from .safe_load import safe_load


def no_training() -> dict[str, Any]:
    """What fairseq looks into of a training's state, of one that has not begun."""
    return {
        "optimizer_history": [{"criterion_name": "", "optimizer_name": "", "lr_scheduler_state": {}, "num_updates": 0}],
        "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}},
    }


def stock_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a packed file or a checkpoint as stock fairseq's own: dense weights, fairseq's names.

    fairseq has no EfficientNet: one keeps its model's name, and its weights get the names that timm loads.

    The training state (optimizer, updates) is left out: it belongs to the quantized weights.

    Raises:
        UserError: neither a packed file nor a checkpoint.
        DamagedFileError: a packed file that is not whole.
    """
    if str(path).endswith(".safetensors"):
        packed = read(path)
        cfg = copy.deepcopy(packed.manifest.model.get("cfg", {}))
        shapes = {name: entry.shape for name, entry in packed.manifest.tensors.items()}
        return _checkpoint(path, as_fairseq(cfg), None, dense_state(packed.state_dict(), shapes))
    state = safe_load(path)
    cfg = copy.deepcopy(state.get("cfg"))
    return _checkpoint(path, cfg, state.get("args"), dense_state(state["model"]))


def _checkpoint(path: str | Path, cfg: Any, args: Any, model: Mapping[str, Any]) -> dict[str, Any]:
    if cfg and cfg.get("model"):
        options = vars(cfg["model"]) if isinstance(cfg["model"], Namespace) else cfg["model"]
        options.update({k: _name(path, options[k]) for k in ("_name", "arch") if isinstance(options.get(k), str)})
        options.update({k: 0.0 for k in NOISE_FLAGS if options.get(k)})
        options.update(EMBEDDING_LAYER if find_embedding_layer(model) else {})
        ours = [n for n in options if n.startswith(PREFIX) and n not in FAIRSEQ_NOISE_OPTIONS]
        for name in (*ours, *STRUCTURE_OPTIONS):
            options.pop(name, None)
        criterion = cfg.get("criterion") or {}
        cfg["criterion"] = criterion if isinstance(criterion, Namespace) else unwrapped(criterion)
    if args is not None:
        args = copy.deepcopy(args)
        args.arch = stock_name(path, args.arch)
    return {
        "args": args,
        "cfg": cfg,
        "model": timm_names(model),
        "criterion": None,
        "task_state": {},
        **no_training(),
        "last_optimizer_state": None,
    }


def _name(path: str | Path, name: str) -> str:
    stock = stock_name(path, name)
    return PREFIX + stock if stock in OF_IMAGES else stock


def write_checkpoint(state: Mapping[str, Any], path: str | Path) -> None:
    """Write a checkpoint, whole or not at all. Raises UserError when the place cannot be written."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    replace_file(path, buffer.getvalue())
