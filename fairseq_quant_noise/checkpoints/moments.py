"""Find Adam's second moments in a checkpoint and name them by their weights."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..quantization.importance import MOMENTS


def moments_in(checkpoint: Mapping[str, Any], network: nn.Module) -> dict[str, Tensor]:
    """The second moments in a fairseq checkpoint, by the name of the weight, in bfloat16; empty where it has none.

    fairseq writes them in the order of the model's parameters and then the criterion's: one tensor per parameter or,
    after fp16 training, all of them end to end in one tensor. If the shapes or the total are not exactly those of this
    checkpoint's parameters (some were frozen, say), the moments cannot be assigned, and the result is empty too.

    Args:
        checkpoint: its content.
        network: of that checkpoint, its quantized weights adopted, on the meta device too; it says which tensors are
            parameters, and which names are tied.

    Returns:
        By name, a tensor of the weight's shape: (out, in) for a Linear, (words, C) for an Embedding.
    """
    weights: Mapping[str, Tensor] = checkpoint["model"]
    names = list(_parameters(weights, network))
    shapes = [weights[group[0]].shape for group in names]
    criterion = checkpoint.get("criterion")
    others = criterion.values() if isinstance(criterion, Mapping) else ()
    shapes += [tensor.shape for tensor in others if isinstance(tensor, Tensor)]
    moments = _laid_out(checkpoint.get("last_optimizer_state"), shapes)
    pairs = zip(names, moments, strict=False)
    found = ((group, tensor.bfloat16()) for group, tensor in pairs if tensor is not None)
    return {name: tensor for group, tensor in found for name in group}


def _parameters(weights: Mapping[str, Tensor], network: nn.Module) -> Iterator[list[str]]:
    """The names of each parameter, in the order of the checkpoint, which is that of `model.parameters()`."""
    groups: dict[int, list[str]] = {}
    for name, tensor in network.state_dict(keep_vars=True).items():  # the names that a checkpoint has
        if isinstance(tensor, nn.Parameter) and name in weights:
            groups.setdefault(id(tensor), []).append(name)
    group_of = {name: group for group in groups.values() for name in group}
    for name in weights:
        group = group_of.get(name, [])
        if group:
            yield [name, *(other for other in group if other != name)]
            for other in group:
                del group_of[other]


def _laid_out(optimizer: object, shapes: Sequence[torch.Size]) -> list[Tensor | None]:
    """The second moments of parameters of these shapes, None of one that never had a gradient; or nothing at all."""
    given = optimizer if isinstance(optimizer, Mapping) else {}
    state, groups = given.get("state"), given.get("param_groups")
    if not isinstance(state, Mapping) or not isinstance(groups, list):
        return []
    keys = [key for group in groups if isinstance(group, Mapping) for key in group.get("params", ())]
    found = [entry.get(MOMENTS) if isinstance(entry := state.get(key), Mapping) else None for key in keys]
    flat, numbers = found[0] if len(found) == 1 else None, [shape.numel() for shape in shapes]
    if isinstance(flat, Tensor) and flat.dim() == 1:
        pieces = flat.split(numbers) if flat.numel() == sum(numbers) else ()
        return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=False)]
    if len(found) != len(shapes):
        return []
    pairs = zip(found, shapes, strict=True)
    return found if all(f is None or (isinstance(f, Tensor) and f.shape == shape) for f, shape in pairs) else []
