"""Straight-through gradients, and whether a backward pass is running."""

from typing import Any

import torch
from torch import Tensor


def in_backward() -> bool:
    """Whether autograd is running, which is when checkpointed layers run again."""
    return torch._C._current_graph_task_id() != -1


class StraightThrough(torch.autograd.Function):
    """Forward: the distorted weight. Backward: the identity, to the stored weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, distorted: Tensor) -> Tensor:
        """Return `distorted`; it and `weight` are (rows, …)."""
        return distorted

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Pass the gradient, (rows, …), to `weight` unchanged: d psi / d W = 1 (Bengio et al., arXiv 1308.3432)."""
        return gradients[0], None
