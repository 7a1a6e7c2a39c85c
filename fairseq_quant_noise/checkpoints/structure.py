"""Pruning and sharing of a fairseq checkpoint: its weights, and the options that say how many layers there are.

What comes out starts a new training from these weights, evaluates and quantizes; of the optimizer's memory only what
k-means weighs errors by is kept.
"""

from argparse import Namespace
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import UserError
from ..networks.registry import PREFIX, stock_name
from ..quantization.importance import follow
from ..structure.layer_map import kept_layers, side_of
from ..structure.modules import keep_by_stack
from ..structure.state import keep_state, share_state, stack_sizes
from .keys import IMPORTANCE, STAGES
from .moments import importance_in
from .network import Trained, as_trained, read_checkpoint
from .stock import no_training


def kept_checkpoint(path: str | Path, keep: object) -> dict[str, Any]:
    """The checkpoint with some of its layers.

    Args:
        path: of a fairseq checkpoint, dense or with quantized weights, of any model whose stacks are called `layers`.
        keep: as in `keep_layers_`.
    Raises:
        UserError: a layer that there is not, the same one twice, none at all, or a part of a chunk.
    """
    state = _read(path)
    importance, weights = importance_in(path, state), state["model"]
    keep_in(state, "--keep", keep)
    return _begun_anew(state, follow(importance, weights, state["model"]))


def shared_checkpoint(path: str | Path, chunk: int, start: str) -> dict[str, Any]:
    """The checkpoint with one set of weights for each chunk of adjacent layers, for the models of this package.

    Args:
        path: of a dense fairseq checkpoint.
        chunk: N, layers that come to share.
        start: `first` or `mean` (see `state.share_state`).
    Raises:
        UserError: N does not divide the layers, the weights are quantized, or a model that this package does not know.
    """
    state = _read(path)
    importance, weights = importance_in(path, state), state["model"]
    share_in(path, state, chunk, start)
    return _begun_anew(state, follow(importance, weights, state["model"]))


def load_structured(path: str | Path, structure: Any, weigh: bool = False) -> Trained:
    """The network of a checkpoint after what a plan's `structure` (or None) asks for: sharing, then pruning.

    Without the optimizer's memory, but for its `importance` where k-means will `weigh` errors by it.

    Raises:
        UserError: as `load_trained`; or `structure` does not fit the checkpoint.
    """
    state = read_checkpoint(path) if structure is None else _read(path)
    importance, weights = importance_in(path, state) if weigh else {}, state["model"]
    state["last_optimizer_state"] = None  # twice the memory of the weights
    if structure is not None and structure.share_layers > 1:
        share_in(path, state, structure.share_layers, structure.share_from)
    if structure is not None and structure.keep_layers is not None:
        keep_in(state, "structure: keep_layers", structure.keep_layers)
    trained = as_trained(path, state)
    trained.importance = follow(importance, weights, state["model"])
    return trained


def keep_in(state: dict[str, Any], where: str, keep: object) -> None:
    """Prune a loaded checkpoint in place; `where` is the option or key, for messages."""
    sizes = stack_sizes(state["model"])
    chunk = max(int(options.get("share_layers") or 1) for options in _options(state))
    wanted = keep_by_stack(where, keep, list(sizes))
    kept = {stack: kept_layers(where, which, stack, sizes[stack], chunk) for stack, which in wanted.items()}
    state["model"] = keep_state(state["model"], kept)
    for options in _options(state):
        options.update(layer_options({side_of(stack): len(layers) for stack, layers in kept.items()}))


def share_in(path: str | Path, state: dict[str, Any], chunk: int, start: str) -> None:
    """Share the layers of a loaded checkpoint in place."""
    state["model"], _ = share_state(state["model"], chunk, start)
    for options in _options(state):
        name = PREFIX + stock_name(path, str(options.get("_name") or options.get("arch")))
        options.update({key: name for key in ("_name", "arch") if options.get(key) is not None}, share_layers=chunk)


def layer_options(counts: Mapping[str, int]) -> dict[str, Any]:
    """fairseq's options of a network that has been pruned to so many layers, by side (encoder, decoder)."""
    return {f"{side}_layers": n for side, n in counts.items()} | {f"{side}_layers_to_keep": None for side in counts}


def _read(path: str | Path) -> dict[str, Any]:
    if str(path).endswith(".safetensors"):
        raise UserError(f"{path}: is a packed file; prune or share the checkpoint that it was made of")
    state = read_checkpoint(path)
    if not stack_sizes(state["model"]):
        raise UserError(f"checkpoint {path}: has no layers (no weights called '….layers.0.…') to prune or share")
    if not list(_options(state)):
        raise UserError(f"checkpoint {path}: holds no configuration ('cfg' or 'args') that says how many layers it has")
    return state


def _options(state: Mapping[str, Any]) -> Iterator[MutableMapping[str, Any]]:
    """The options of the model, to read and to change: in `cfg`, and in the `args` of old checkpoints."""
    for found in ((state.get("cfg") or {}).get("model"), state.get("args")):
        if found is not None:
            yield vars(found) if isinstance(found, Namespace) else found


def _begun_anew(state: Mapping[str, Any], importance: Mapping[str, Tensor]) -> dict[str, Any]:
    fresh = no_training()
    stages = (state.get("extra_state") or {}).get(STAGES)
    if stages is not None:  # which stages are done; updates count from 0 again
        origin = -stages["starts"][stages["done"] - 1] if stages["done"] else None
        fresh["extra_state"][STAGES] = {**stages, "origin": origin}
    if importance:
        fresh["extra_state"][IMPORTANCE] = dict(importance)
    return {**state, "last_optimizer_state": None, **fresh}
