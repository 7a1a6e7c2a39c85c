"""Compute a layer of an encoder in one call of the compiled kernels, where a file's integers allow it.

The modules of the layer are asked for their weights and not called, so nothing may hang on their calls: hooks, a graph
that is made, gradients, autocast. Results are the modules' within float32's rounding.

Shapes: B batch, T tokens, C channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..kernels import in_graph, takes_integers
from ..kernels.encoder_layer import encoder_layer
from ..layers.products import Described, norm_of, product_of, refresh

_GELU = {"gelu": True, "relu": False}  # what the kernel has


def whole_layer(
    x: Tensor,
    mask: Tensor | None,
    heads: int,
    normalize_before: bool,
    activation_fn: str,
    norms: Sequence[nn.Module],
    products: Sequence[nn.Module],
) -> Tensor | None:
    """A layer of self-attention and a feed-forward block.

    Args:
        x: (B, T, C).
        mask: (B, 1, 1, T) bool, the keys that are seen, or None.
        heads: of the attention.
        normalize_before: norms come before the two blocks, not after them.
        activation_fn: of the feed-forward block, one of ACTIVATIONS.
        norms: of attention and of the feed-forward block.
        products: for query, key, value and output of the attention, and the two of the feed-forward block.

    Returns:
        (B, T, C), or None where the modules have to be called.
    """
    if activation_fn not in _GELU or not _is_bare(x) or not _is_key_mask(mask, x):
        return None
    dim = x.shape[2]
    if dim % heads:
        return None
    numbers = [norm_of(norm, dim) for norm in norms]
    for _ in range(2):
        factors = [product_of(product) for product in products]
        if None in numbers or not _is_layer(factors, dim):
            return None
        described: list[bytes] = [of[0] for of in factors if of is not None]
        arguments = heads, normalize_before, _GELU[activation_fn], mask
        found = encoder_layer(x.contiguous(), *arguments, numbers, described)  # type: ignore[arg-type]
        if found is not None:
            return found
        for product in products:
            refresh(product)
    return None


def _is_layer(factors: Sequence[Described | None], dim: int) -> bool:
    """Whether there are all of the products, with weights that fit each other and channels `dim`."""
    if None in factors:
        return False
    shapes = [of[1] for of in factors if of is not None]
    inner = shapes[4][0]
    return shapes == [(dim, dim)] * 4 + [(inner, dim), (dim, inner)]


def _is_bare(x: Tensor) -> bool:
    """Whether x (B, T, C) is a tensor of numbers that nobody follows through the modules."""
    traced = in_graph() or torch._C._get_tracing_state() is not None
    followed = traced or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or _has_any_global_hook()
    return not followed and type(x) is Tensor and x.dim() == 3 and takes_integers(x)


def _is_key_mask(mask: Tensor | None, x: Tensor) -> bool:
    shape = x.shape[0], 1, 1, x.shape[1]
    return mask is None or (mask.dtype == torch.bool and mask.shape == shape and mask.is_contiguous())
