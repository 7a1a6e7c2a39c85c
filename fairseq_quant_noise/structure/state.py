"""Prune and share the layers of a state dict, whose entries are named as in `decoder.layers.3.fc1.weight`."""

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..errors import UserError
from ..layers.inputs import NAME as INPUT_QUANTIZER
from ..layers.registry import recognise
from .layer_map import chunk_map

_LAYER = re.compile(r"((?:[^.]+\.)*?layers)\.(\d+)\.(.+)")  # the stack, the number, the rest
#: Entries that stay per layer even when its weights are shared: the range of its input, the statistics of its batch
#: normalisation.
_OF_A_USE = re.compile(rf"(.+\.)?({INPUT_QUANTIZER}\..+|running_mean|running_var|num_batches_tracked)")


def stack_sizes(state: Mapping[str, object]) -> dict[str, int]:
    """How many layers each stack has, by the stack's name (`decoder.layers`)."""
    sizes: dict[str, int] = {}
    for key in state:
        found = _LAYER.fullmatch(key)
        if found:
            sizes[found[1]] = max(sizes.get(found[1], 0), int(found[2]) + 1)
    return sizes


def keep_state(state: Mapping[str, Tensor], keep: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """`state` with only the layers to keep, renumbered from 0; stacks that `keep` does not name stay as they are.

    Args:
        state: tensors of any shape, of dense or quantized weights; they are passed on, not copied.
        keep: by stack, the layers to keep (see `layer_map.kept_layers`).
    """
    numbers = {stack: {old: new for new, old in enumerate(layers)} for stack, layers in keep.items()}
    kept: dict[str, Tensor] = {}
    for key, tensor in state.items():
        found = _LAYER.fullmatch(key)
        if found is None or found[1] not in numbers:
            kept[key] = tensor
        elif int(found[2]) in numbers[found[1]]:
            kept[f"{found[1]}.{numbers[found[1]][int(found[2])]}.{found[3]}"] = tensor
    return kept


def share_state(state: Mapping[str, Tensor], chunk: int, start: str = "first") -> tuple[dict[str, Tensor], list[str]]:
    """`state` with one set of weights for each chunk of adjacent layers, and the names of the stacks that changed.

    Args:
        state: tensors of any shape, of all layers; those of one chunk must have equal shapes, such as (out, in) for
            each `fc1.weight`. Layers that share already are left as they are.
        chunk: N, the number of adjacent layers that will share.
        start: `first`, the weights of the chunk's first layer, or `mean`, over its layers.

    Raises:
        UserError: `chunk` does not divide a stack, layers of a chunk differ in the names or shapes of their tensors,
            or their weights are quantized and differ.
    """
    maps = {stack: chunk_map(stack, n, chunk) for stack, n in stack_sizes(state).items()}
    shared, changed = dict(state), []
    for key in state:
        found = _LAYER.fullmatch(key)
        if found is None or maps[found[1]][int(found[2])] != int(found[2]):
            continue
        stack, first, rest = found[1], int(found[2]), found[3]
        uses = [i for i, stored in enumerate(maps[stack]) if stored == first]
        names = [f"{stack}.{i}.{rest}" for i in uses]
        if _OF_A_USE.fullmatch(rest):
            continue
        tensors = [state[name] for name in names if name in state]
        if len(tensors) < len(names) or any(t.shape != tensors[0].shape for t in tensors):
            raise UserError(f"{stack}: layers {first} to {uses[-1]} differ in {rest}; they cannot be shared")
        if any(not _same(tensor, tensors[0]) for tensor in tensors):
            if recognise(state, names[0].rpartition(".")[0]) is not None:
                raise UserError(f"{names[0]}: is quantized; share the layers of the dense checkpoint, then quantize it")
            changed.append(stack)
            if start == "mean":
                tensors[0] = torch.stack([t.float() for t in tensors]).mean(0).to(tensors[0].dtype)
        shared.update(dict.fromkeys(names, tensors[0]))
    return shared, list(dict.fromkeys(changed))


def _same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() or torch.equal(one, other)


def maps_and_ties(ties: Mapping[str, str], names: Iterable[str]) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Split ties into maps of whole shared layers and the remaining ties.

    Args:
        ties: tied copy -> the tensor that stores it.
        names: the names of the stored tensors.

    Returns:
        By stack, for each layer in use the layer that stores its weights; and the other ties.
    """
    layers: dict[str, dict[int, dict[str, str | None]]] = {}
    for key in (*names, *ties):
        found = _LAYER.fullmatch(key)
        if found:
            layers.setdefault(found[1], {}).setdefault(int(found[2]), {})[found[3]] = ties.get(key)
    maps: dict[str, list[int]] = {}
    for stack, parts in layers.items():
        stored = [_stored_in(stack, i, parts) for i in range(len(parts))] if max(parts) + 1 == len(parts) else []
        if stored != list(range(len(stored))):
            maps[stack] = stored
    whole = layer_ties(maps, names)
    return maps, {copy: owner for copy, owner in ties.items() if copy not in whole}


def _stored_in(stack: str, i: int, layers: Mapping[int, Mapping[str, str | None]]) -> int:
    """The layer j whose tensors all tensors of layer i are tied to; i itself if there is none."""
    shared = {rest: owner for rest, owner in layers[i].items() if not _OF_A_USE.fullmatch(rest)}
    found = _LAYER.fullmatch(next(iter(shared.values()), None) or "")
    j = int(found[2]) if found else i
    same = all(owner == f"{stack}.{j}.{rest}" for rest, owner in shared.items())
    return j if same and layers[i].keys() == layers.get(j, {}).keys() else i


def layer_ties(maps: Mapping[str, Sequence[int]], names: Iterable[str]) -> dict[str, str]:
    """Convert maps of layers to ties, tied copy -> the tensor that stores it; `names` as in `maps_and_ties`."""
    uses: dict[tuple[str, int], list[int]] = {}
    for stack, stored in maps.items():
        for i, j in enumerate(stored):
            if i != j:
                uses.setdefault((stack, j), []).append(i)
    ties: dict[str, str] = {}
    for name in names:
        found = _LAYER.fullmatch(name)
        if found and not _OF_A_USE.fullmatch(found[3]):
            copies = uses.get((found[1], int(found[2])), ())
            ties.update({f"{found[1]}.{i}.{found[3]}": name for i in copies})
    return ties
