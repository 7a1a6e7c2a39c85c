"""Which numbers of a weight matter: those with large gradients, by Adam's second moments.

To second order, and with the diagonal of the Fisher matrix F for the curvature, codes that make W_hat of W cost

    L(W_hat) - L(W) ~ 1/2 sum_j F_jj (W_hat_j - W_j)^2,    F_jj = E[g_j^2],    g the gradient of the loss L.

Adam (arXiv 1412.6980) keeps a running mean of g_j^2 for each number, `exp_avg_sq`, in every checkpoint of its training.
k-means that weighs errors by it (`pq/kmeans.py`) needs no data and no further pass; where another optimizer trained the
network, `calibration.squared_gradients` measures g_j^2. Only ratios within a codebook count.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError

MOMENTS = "exp_avg_sq"  # in the state of torch's Adam, and of all that descend from it


def second_moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Adam's second moments of the parameters of `model`, for `quantize_(…, importance=…)`.

    Args:
        model: any network, before it is quantized.
        optimizer: of its training; an Adam, AdamW or the like.
    Returns:
        By the parameter's name, tied ones under each name; of those that the optimizer has stepped.
    Raises:
        UserError: an optimizer without second moments.
    """
    found = {
        name: optimizer.state[parameter][MOMENTS]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if MOMENTS in optimizer.state.get(parameter, {})
    }
    if not found:
        raise UserError(
            f"{type(optimizer).__name__} holds no second moments ({MOMENTS}) of this model; give the Adam that trained "
            "it, after a step, or quantize without importance"
        )
    return found


def moments_in(checkpoint: Mapping[str, Any], network: nn.Module) -> dict[str, Tensor]:
    """The second moments in a fairseq checkpoint, by the name of the weight, in bfloat16; empty where it has none.

    fairseq writes them in the order of the model's parameters, those of the criterion after them: one by one or, of its
    fp16 training, end to end in one tensor. Shapes or a total that are not exactly those of this checkpoint's
    parameters, as where some were frozen, mean that nobody can tell whose they are: empty too.

    Args:
        checkpoint: its content.
        network: of that checkpoint, its quantized weights adopted, on the meta device too; it says which tensors are
            parameters, and which names are tied.
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


def follow(
    moments: Mapping[str, Tensor], before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The moments under the names that their weights have after layers were pruned or shared.

    Args:
        moments: by the names of before.
        before: the weights.
        after: those that are left, the same tensors; one that is new, as a mean over layers, has no moments.
    """
    by_weight = {id(before[name]): tensor for name, tensor in moments.items()}
    return {name: by_weight[id(tensor)] for name, tensor in after.items() if id(tensor) in by_weight}


def sound(moments: object, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of the moments, from a file or a training, that fit their weights and are finite and not negative."""
    given = moments if isinstance(moments, Mapping) else {}
    return {
        name: tensor
        for name, tensor in given.items()
        if isinstance(tensor, Tensor)
        and name in weights
        and tensor.shape == weights[name].shape
        and bool(((tensor >= 0) & tensor.isfinite()).all())
    }


def check_importance(importance: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> None:
    """Refuse what does not fit the weights.

    Args:
        importance: by the tensor's name.
        shapes: of the weights to quantize, by the tensor's name.
    Raises:
        UserError: another shape, or numbers that are negative or not finite; it names the tensor.
    """
    for name, tensor in importance.items():
        if name in shapes and tuple(tensor.shape) != tuple(shapes[name]):
            raise UserError(
                f"importance of {name}: has shape {tuple(tensor.shape)}, the weight {tuple(shapes[name])}; "
                "give a number for each of the weight's"
            )
        if name in shapes and not bool(((tensor >= 0) & tensor.isfinite()).all()):
            raise UserError(f"importance of {name}: holds negative numbers, NaN or infinity; give 0 or more")


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
