"""Measure squared gradients on a few batches, to weigh k-means where the optimizer has no second moments."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.batch_statistics import by_batch


def squared_gradients(
    model: nn.Module, criterion: Any, samples: Iterable[Any], scale: float = 1.0
) -> dict[str, Tensor]:
    """Sum over batches the squared gradient of their mean loss, for each number of each weight.

    The sum estimates the diagonal of the Fisher matrix up to a factor (`quantization/importance.py`). Noise and dropout
    are off meanwhile, and batch normalisation goes by each batch (`by_batch`); the model's gradients are cleared.

    Args:
        model: fairseq's.
        criterion: fairseq's; called with the model and a batch.
        samples: batches, on the model's device.
        scale: a factor on the loss, for gradients in half precision.

    Returns:
        By the parameter's name, a bfloat16 tensor of its shape, such as (out, in) for a Linear; parameters without
        gradients are left out.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    sums = {id(p): torch.zeros_like(p, dtype=torch.float32) for p in parameters.values() if p.requires_grad}
    training = model.training
    model.eval()
    for sample in samples:
        model.zero_grad()
        with torch.enable_grad(), by_batch(model):
            loss, size, _ = criterion(model, sample)
            (loss * (scale / max(float(size), 1.0))).backward()
        for p in {id(p): p for p in parameters.values() if p.grad is not None}.values():
            sums[id(p)] += p.grad.float().square().nan_to_num(0.0, 0.0)  # type: ignore[union-attr]
    model.zero_grad()
    model.train(training)
    found = {name: sums[id(p)].bfloat16() for name, p in parameters.items() if id(p) in sums}
    return {name: tensor for name, tensor in found.items() if bool(tensor.any())}
