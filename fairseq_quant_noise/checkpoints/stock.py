"""Convert to a stock fairseq checkpoint, which loads without this package and has the same score."""

import copy
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..artifact import dense_state, read
from ..artifact.reader import is_packed
from ..networks.registry import OF_IMAGES, PREFIX, stock_name
from ..networks.roberta_config import FAIRSEQ_EPS
from ..networks.timm_weights import timm_names
from ..structure.learned_rates import without_scores
from .checkpoint import Checkpoint
from .keys import no_training
from .options import (
    EMBEDDING_LAYER,
    FAIRSEQ_NOISE_OPTIONS,
    NOISE_FLAGS,
    STRUCTURE_OPTIONS,
    as_fairseq,
    find_embedding_layer,
    unwrapped,
)


def stock_checkpoint(path: str | Path) -> Checkpoint:
    """Convert a packed file or a checkpoint to one of stock fairseq: dense weights under fairseq's names.

    fairseq has no EfficientNet: its model keeps this package's name, and its weights get the names that timm loads.

    The training state (optimizer, updates) is left out: it belongs to the quantized weights.

    Raises:
        UserError: the file cannot be read, or is neither a packed file nor a checkpoint.
        DamagedFileError: the file is not whole, or a checkpoint holds anything outside the allow-list.
    """
    if is_packed(path):
        packed = read(path)
        cfg = copy.deepcopy(packed.manifest.model.get("cfg", {}))
        shapes = {name: entry.shape for name, entry in packed.manifest.tensors.items()}
        turned = {name for name, entry in packed.manifest.tensors.items() if entry.transposed}
        return _checkpoint(path, as_fairseq(cfg), None, dense_state(packed.state_dict(), shapes, turned))
    given = Checkpoint(path)
    dense = dense_state(given.weights, *given.shapes)
    return _checkpoint(path, copy.deepcopy(given.state.get("cfg")), given.state.get("args"), dense)


def _checkpoint(
    path: str | Path, cfg: dict[str, Any] | None, args: Namespace | None, model: Mapping[str, Tensor]
) -> Checkpoint:
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
        args.arch = _name(path, args.arch)
    state = {
        "args": args,
        "cfg": cfg,
        "model": without_scores(timm_names(model)),
        "criterion": None,
        "task_state": {},
        **no_training(),
        "last_optimizer_state": None,
    }
    return Checkpoint(path, state)


def difference(stock: Checkpoint) -> str | None:
    """What a checkpoint of stock fairseq computes differently, if anything, than what it was made of."""
    for options in ((stock.state["cfg"] or {}).get("model"), stock.state["args"]):
        given = vars(options) if isinstance(options, Namespace) else options or {}
        eps = given.get("layer_norm_eps") or FAIRSEQ_EPS
        if eps != FAIRSEQ_EPS:
            return f"its layer norms add {eps:g} to the variance, and those of stock fairseq {FAIRSEQ_EPS:g}"
    return None


def _name(path: str | Path, name: str) -> str:
    """fairseq's name of a model or an architecture; stock ones keep theirs, whatever they are."""
    if not name.startswith(PREFIX):
        return name
    stock = stock_name(path, name)
    return PREFIX + stock if stock in OF_IMAGES else stock
