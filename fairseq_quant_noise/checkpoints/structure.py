"""Prune and share the layers of a fairseq checkpoint: its weights, and the options that give the number of layers.

The result can be evaluated and quantized, and a new training can start from it. Of the optimizer's state only Adam's
second moments are kept, by which k-means weighs errors.
"""

import copy
from argparse import Namespace
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor

from ..artifact.reader import is_packed
from ..errors import UserError
from ..networks.registry import PREFIX, stock_name
from ..plan.rules import Structure
from ..quantization.importance import follow
from ..structure.layer_map import Keep, is_learned, kept_layers, learned_layers, side_of
from ..structure.learned_rates import without_scores
from ..structure.modules import SCORES, keep_by_stack
from ..structure.state import keep_state, share_state, stack_sizes
from .checkpoint import Checkpoint
from .keys import IMPORTANCE, STAGES, no_training
from .options import LEARN


def pruned(checkpoint: Checkpoint, keep: object, where: str) -> Checkpoint:
    """The checkpoint with some of its layers.

    Args:
        checkpoint: dense or with quantized weights, of any model whose stacks are called `layers`.
        keep: as in `keep_layers_`; the scores of `learned` are those in the checkpoint.
        where: the option or key that says so, for messages.

    Raises:
        UserError: the checkpoint has no layers or no configuration, or `keep` names an unknown stack or layer, a layer
            twice, no layer at all, only part of a chunk, or learned rates that the checkpoint does not have.
    """
    _check_layers(checkpoint)
    sizes = stack_sizes(checkpoint.weights)
    wanted = keep_by_stack(where, keep, list(sizes), learned=True)
    kept = {stack: _kept(checkpoint, where, which, stack, sizes[stack]) for stack, which in wanted.items()}
    counts = {side_of(stack): len(layers) for stack, layers in kept.items()}
    weights = without_scores(keep_state(checkpoint.weights, kept))
    less = _begun_anew(checkpoint, weights, layer_options(counts))
    for options in _options(less.state):
        options.pop(LEARN, None)
    return less


def _kept(checkpoint: Checkpoint, where: str, keep: Keep, stack: str, n_layers: int) -> list[int]:
    """The layers of one stack that stay."""
    given = list(_options(checkpoint.state))
    chunk = max(int(options.get("share_layers") or 1) for options in given)
    if not is_learned(keep):
        return kept_layers(where, keep, stack, n_layers, chunk)
    scores = checkpoint.weights.get(f"{stack}.{SCORES}")
    found = None if scores is None else scores.float().tolist()
    p = next((p for options in given if (p := options.get(f"{side_of(stack)}_layerdrop"))), None)
    return learned_layers(where, keep, stack, n_layers, chunk, found, p)


def shared(checkpoint: Checkpoint, chunk: int, start: str) -> Checkpoint:
    """The checkpoint with one set of weights for each chunk of adjacent layers, for the models of this package.

    Args:
        checkpoint: a dense one.
        chunk: N, layers that come to share.
        start: `first` or `mean` (see `state.share_state`).

    Raises:
        UserError: the checkpoint has no layers or no configuration, N does not divide the layers, the weights to share
            are quantized or differ in shape, or this package does not know the model.
    """
    _check_layers(checkpoint)
    weights, _ = share_state(checkpoint.weights, chunk, start)
    less = _begun_anew(checkpoint, weights, {"share_layers": chunk})
    for options in _options(less.state):
        name = PREFIX + stock_name(checkpoint.path, str(options.get("_name") or options.get("arch")))
        options.update({key: name for key in ("_name", "arch") if options.get(key) is not None})
    return less


def restructured(checkpoint: Checkpoint, structure: Structure | None) -> Checkpoint:
    """The checkpoint after what a plan's `structure` asks for, sharing and then pruning; itself without one.

    Raises:
        UserError: `structure` does not fit the checkpoint.
    """
    if structure is None:
        return checkpoint
    _check_layers(checkpoint)
    if structure.share_layers > 1:
        checkpoint = shared(checkpoint, structure.share_layers, structure.share_from)
    if structure.keep_layers is not None:
        checkpoint = pruned(checkpoint, structure.keep_layers, "structure: keep_layers")
    return checkpoint


def layer_options(counts: Mapping[str, int]) -> dict[str, Any]:
    """fairseq's options of a network that has been pruned to so many layers, by side (encoder, decoder)."""
    return {f"{side}_layers": n for side, n in counts.items()} | {f"{side}_layers_to_keep": None for side in counts}


def _check_layers(checkpoint: Checkpoint) -> None:
    """Raise UserError for a packed file, and for a checkpoint without layers or without a configuration."""
    path = checkpoint.path
    if is_packed(path):
        raise UserError(f"{path}: is a packed file; prune or share the checkpoint that it was made of")
    if not stack_sizes(checkpoint.weights):
        raise UserError(f"checkpoint {path}: has no layers (no weights called '….layers.0.…') to prune or share")
    if not list(_options(checkpoint.state)):
        raise UserError(f"checkpoint {path}: holds no configuration ('cfg' or 'args') that says how many layers it has")


def _options(state: Mapping[str, Any]) -> Iterator[MutableMapping[str, Any]]:
    """The options of the model, to read and to change: in `cfg`, and in the `args` of old checkpoints."""
    for found in ((state.get("cfg") or {}).get("model"), state.get("args")):
        if found is not None:
            yield vars(found) if isinstance(found, Namespace) else found


def _begun_anew(checkpoint: Checkpoint, weights: dict[str, Tensor], changed: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint with new weights and options, the state of a training before its first update, and its moments."""
    fresh = no_training()
    stages = checkpoint.stages
    if stages:  # which stages are done; updates count from 0 again
        origin = -stages["starts"][stages["done"] - 1] if stages["done"] else None
        fresh["extra_state"][STAGES] = {**stages, "origin": origin}
    moments = follow(checkpoint.moments, checkpoint.weights, weights)
    if moments:
        fresh["extra_state"][IMPORTANCE] = moments
    configuration = {name: copy.deepcopy(checkpoint.state.get(name)) for name in ("cfg", "args")}
    state = {**checkpoint.state, **configuration, "model": weights, "last_optimizer_state": None, **fresh}
    for options in _options(state):
        options.update(changed)
    return Checkpoint(checkpoint.path, state)
