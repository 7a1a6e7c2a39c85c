"""The products as operators of torch, so that torch.compile and torch.export take a quantized network as one graph.

The graph calls the operator, and the operator the form that the machine has when it runs; without compiled kernels
integers are decoded for a product in fp32, as they are without a graph. Nothing else goes through here: an operator
costs as much time as a small product.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu, gpu, reference

Function = TypeVar("Function", bound=Callable[..., Any])


def form_of(x: Tensor) -> Any:
    """The module with the fastest form of `linear` for x (..., I)."""
    return cpu if cpu.takes(x) else gpu if gpu.takes(x) else reference


def _operator(rows: Callable[[Tensor], int]) -> Callable[[Function], Function]:
    """Make an operator of a product x, codes, ... -> (..., O); `rows` finds O from the codes."""

    def made(function: Function) -> Function:
        name = f"fairseq_quant_noise::{function.__name__}"
        operator: Any = torch.library.custom_op(name, function, mutates_args=())
        operator.register_fake(lambda x, codes, *_: x.new_empty(*x.shape[:-1], rows(codes)))
        return operator

    return made


@_operator(lambda codes: codes.shape[1])
def linear(x: Tensor, codes: Tensor, centroids: Tensor, bias: Tensor | None) -> Tensor:
    """As `kernels.linear`, for x (..., I), codes (I/d, O), centroids (K, d) and bias (O,): (..., O)."""
    found: Tensor = form_of(x).linear(x, codes, centroids, bias)
    return found


@_operator(lambda codes: codes.shape[0])
def linear_of_codes(x: Tensor, codes: Tensor, affine: Tensor, bias: Tensor | None, grid: Tensor | None) -> Tensor:
    """As `kernels.linear_of_codes`, for x (..., I), codes (O, I), affine (2, C), bias (O,) and grid (2,): (..., O)."""
    if cpu.takes(x):
        return cpu.linear_of_codes(x, codes, affine, bias, grid)
    return F.linear(x, reference.dense(codes, affine), bias)


@_operator(lambda codes: codes.shape[1])
def linear_of_centroids(
    x: Tensor, codes: Tensor, centroids: Tensor, affine: Tensor, bias: Tensor | None, grid: Tensor | None
) -> Tensor:
    """As `kernels.linear_of_centroids`, for x (..., I), codes (I/d, O), centroids (256, d), affine (2, 1): (..., O)."""
    if cpu.takes(x):
        return cpu.linear_of_centroids(x, codes, centroids, affine, bias, grid)
    return F.linear(x, reference.dense(reference.decode(codes.t(), centroids), affine), bias)
