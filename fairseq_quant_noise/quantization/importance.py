"""Weigh the numbers of a weight by their squared gradients, read from Adam's second moments.

To second order, and with the diagonal of the Fisher matrix F for the curvature, codes that make W_hat of W cost

    L(W_hat) - L(W) ~ 1/2 sum_j F_jj (W_hat_j - W_j)^2,    F_jj = E[g_j^2],    g the gradient of the loss L.

Adam (arXiv 1412.6980) keeps a running mean of g_j^2 for each number, `exp_avg_sq`, in every checkpoint of its training.
k-means that weighs errors by it (`pq/kmeans.py`) needs no data and no further pass; where another optimizer trained the
network, `calibration.squared_gradients` measures g_j^2. Only ratios within a codebook count.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import UserError

MOMENTS = "exp_avg_sq"  # in the state of torch's Adam, and of all that descend from it


def second_moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Adam's second moments of the parameters of `model`, for `quantize_(…, importance=…)`.

    Args:
        model: any network, before it is quantized.
        optimizer: the one that trained it; an Adam, AdamW or the like.

    Returns:
        By the parameter's name, a tensor of the parameter's shape, such as (out, in) for a Linear; tied parameters
        under each of their names. Parameters that the optimizer has never stepped are left out.

    Raises:
        UserError: the optimizer holds no second moments of any parameter of `model`.
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


def follow(
    moments: Mapping[str, Tensor], before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Rename the moments as their weights were renamed when layers were pruned or shared.

    Args:
        moments: by the old name, each of its weight's shape, such as (out, in).
        before: the weights by their old names.
        after: the remaining weights by their new names, the same tensor objects. A new tensor, such as a mean over
            layers, has no moments.

    Returns:
        By the new name, the moments of the remaining weights, unchanged in shape.
    """
    by_weight = {id(before[name]): tensor for name, tensor in moments.items()}
    return {name: by_weight[id(tensor)] for name, tensor in after.items() if id(tensor) in by_weight}


def sound(moments: object, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Select the moments that fit their weights and are finite and not negative.

    Args:
        moments: from a file or a training, so that it may be anything; a mapping from names to tensors if sound.
        weights: by name, of any shape; the moments of one must have its shape, such as (out, in).
    """
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
    """Refuse an importance that does not fit the weights.

    Args:
        importance: by the tensor's name, a tensor of the weight's shape, such as (out, in) for a Linear.
        shapes: by the tensor's name, the shape of each weight to quantize.

    Raises:
        UserError: a tensor has another shape, or holds numbers that are negative or not finite; the message names it.
    """
    for name, tensor in importance.items():
        if name in shapes and tuple(tensor.shape) != tuple(shapes[name]):
            raise UserError(
                f"importance of {name}: has shape {tuple(tensor.shape)}, the weight {tuple(shapes[name])}; "
                "give a number for each of the weight's"
            )
        if name in shapes and not bool(((tensor >= 0) & tensor.isfinite()).all()):
            raise UserError(f"importance of {name}: holds negative numbers, NaN or infinity; give 0 or more")
