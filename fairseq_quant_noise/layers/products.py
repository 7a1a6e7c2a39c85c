"""Describe a module's product in whole numbers for a kernel that does several in one call (`kernels/encoder_layer.py`).

It says no wherever a call of the module would do more than that product. A description is kept with the weight, and
made anew when one of its tensors is another one or has moved.
"""

from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import LONGEST
from ..kernels import encoder_layer as kernel
from ..weights.access import settled_weight
from .inputs import NAME, InputQuantizer
from .parts import AFFINE, CENTROIDS, CODES
from .pq import PQWeight
from .scalar import IntWeight

#: A product for the kernel, its O and I, and the tensors whose addresses it holds, which have to live as long.
Described = tuple[bytes, tuple[int, int], tuple[Tensor, ...]]
_KEPT = "_product"  # an attribute of a quantized weight


def product_of(module: nn.Module) -> Described | None:
    """The product (`kernel.product`) that a call of `module` is, or None where it is another; gradients are off.

    Nothing is copied, so a description is good for one call, and has to be held as long.
    """
    own = module.__dict__
    weight, quantizer = own["_modules"].get("weight"), own["_modules"].get(NAME)
    if own["_forward_hooks"] or "forward" in own or len(own["_forward_pre_hooks"]) != (quantizer is not None):
        return None
    grid = None if quantizer is None else _grid_of(quantizer)
    if weight is None or weight.training or (quantizer is not None and grid is None):
        return None
    held: dict[str, Any] = weight.__dict__
    buffers, parameters = held["_buffers"], held["_parameters"]
    tensors = (
        *(buffers.get(CODES), buffers.get(AFFINE), parameters.get(CENTROIDS), own["_parameters"].get("bias"), grid),
        *(held.get("_stored") or (None, None)),
    )
    kept: _Kept | None = held.get(_KEPT)
    holder = type(module), getattr(weight, "dtype", None)
    if kept is None or kept.holder != holder or not kept.is_of(tensors):
        described = None if settled_weight(module) is None else _described(weight, *tensors[3:5])
        held[_KEPT] = kept = _Kept(holder, tensors, described)
    return kept.product


def norm_of(module: nn.Module, dim: int) -> bytes | None:
    """The norm (`kernel.norm`) over the last dimension, of `dim` numbers, that a call of `module` is; or None."""
    own: dict[str, Any] = module.__dict__
    hooks = own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own
    if hooks or type(module) is not nn.LayerNorm or own["normalized_shape"] != (dim,):
        return None
    scale, shift = own["_parameters"]["weight"], own["_parameters"]["bias"]
    return kernel.norm(scale, shift, own["eps"]) if _is_read(scale) and _is_read(shift) else None


class _Kept:
    """What was found of a weight of a dtype, in a module of a class, whose product depends on some tensors."""

    __slots__ = ("holder", "places", "product", "some", "tensors")

    def __init__(
        self, holder: tuple[type, torch.dtype | None], tensors: Sequence[Tensor | None], product: Described | None
    ) -> None:
        self.holder, self.tensors, self.product = holder, tensors, product
        self.some = [tensor for tensor in tensors if tensor is not None]
        self.places = [*map(_place, self.some)]

    def is_of(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether the tensors are these, and lie in memory as they did; `.data` may have been given to one."""
        return all(map(is_, self.tensors, tensors)) and [*map(_place, self.some)] == self.places

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Nothing, None, of copies and pickles: their tensors lie elsewhere."""
        return type(None), ()


def _place(tensor: Tensor) -> tuple[int, torch.dtype, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.dtype, tensor.stride()


def refresh(module: nn.Module) -> None:
    """Round the centroids of the module's weight to bytes again, if they have changed."""
    weight = module._modules.get("weight")
    if isinstance(weight, PQWeight):
        weight.centroids_in_bytes()
        weight.__dict__.pop(_KEPT, None)


def _is_read(tensor: Tensor | None) -> bool:
    if tensor is None:
        return True
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.is_contiguous()


def _grid_of(quantizer: nn.Module) -> Tensor | None:
    """Scale and zero point (2,) of inputs, where they are the same for all."""
    if not isinstance(quantizer, InputQuantizer) or quantizer.bits != 8 or quantizer.count == 0:
        return None
    return None if quantizer.training or quantizer.calibrating else quantizer.grid(quantizer.range)


def _described(weight: Any, bias: Tensor | None, grid: Tensor | None) -> Described | None:
    if type(weight) not in (IntWeight, PQWeight) or not _is_read(bias):
        return None  # of other formats nothing is known here
    if weight.dtype != torch.float32 or len(weight.shape) != 2 or weight.device.type != "cpu":
        return None
    rows, inner = weight.shape
    if inner > LONGEST:
        return None
    if type(weight) is IntWeight:
        fits = weight.codes.is_contiguous() and weight.affine.is_contiguous()
        product = kernel.product(weight.codes, weight.affine, bias, grid) if fits else None
        return None if product is None else (product, (rows, inner), _some(weight.codes, weight.affine, bias, grid))
    codes = weight.codes.t()
    fits = weight.bits == 8 and weight.n_centroids <= 256
    if not fits or not codes.is_contiguous() or not _is_read(weight.centroids):
        return None
    in_bytes, affine = weight.centroids_in_bytes()
    then = weight._stored[0]
    product = kernel.product(codes, affine, bias, grid, (in_bytes, weight.centroids, then))
    return product, (rows, inner), _some(codes, weight.centroids, in_bytes, affine, then, bias, grid)


def _some(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(tensor for tensor in tensors if tensor is not None)
