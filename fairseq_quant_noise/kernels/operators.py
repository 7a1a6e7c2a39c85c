"""The products as operators of torch, so that torch.compile and torch.export take a quantized network as one graph.

The graph calls the operator, and the operator the form that the machine has when it runs. Without a graph nothing goes
through here: an operator costs as much time as a small product.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import cpu, gpu, reference

F = TypeVar("F", bound=Callable[..., Any])


def in_graph() -> bool:
    """Whether torch.compile or torch.export is making a graph of what runs now."""
    return torch.compiler.is_compiling() or torch.compiler.is_exporting()


def _operator(rows: Callable[[Tensor], int]) -> Callable[[F], F]:
    """Make an operator of a product x, codes, ... -> (..., O); `rows` finds O from the codes."""

    def made(function: F) -> F:
        name = f"fairseq_quant_noise::{function.__name__}"
        operator: Any = torch.library.custom_op(name, function, mutates_args=())
        operator.register_fake(lambda x, codes, *_: x.new_empty(*x.shape[:-1], rows(codes)))
        return operator

    return made


@_operator(lambda codes: codes.shape[1])
def linear(x: Tensor, codes: Tensor, centroids: Tensor, bias: Tensor | None) -> Tensor:
    """As `kernels.linear`, for x (..., I), codes (I/d, O), centroids (K, d) and bias (O,): (..., O)."""
    form = cpu if cpu.takes(x) else gpu if gpu.takes(x) else reference
    return form.linear(x, codes, centroids, bias)


@_operator(lambda codes: codes.shape[0])
def linear_of_codes(x: Tensor, codes: Tensor, affine: Tensor, bias: Tensor | None, grid: Tensor | None) -> Tensor:
    """As `kernels.linear_of_codes`, for x (..., I), codes (O, I), affine (2, C), bias (O,) and grid (2,): (..., O)."""
    return (cpu if cpu.takes(x) else reference).linear_of_codes(x, codes, affine, bias, grid)


@_operator(lambda codes: codes.shape[1])
def linear_of_centroids(
    x: Tensor, codes: Tensor, centroids: Tensor, affine: Tensor, bias: Tensor | None, grid: Tensor | None
) -> Tensor:
    """As `kernels.linear_of_centroids`, for x (..., I), codes (I/d, O), centroids (256, d), affine (2, 1): (..., O)."""
    return (cpu if cpu.takes(x) else reference).linear_of_centroids(x, codes, centroids, affine, bias, grid)
