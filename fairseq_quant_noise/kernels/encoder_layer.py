"""A layer of a Transformer encoder whose six products are in whole numbers, in one call (native/layer.cpp).

At a few tokens, calls of Python and torch take half of the time of a layer that is made of modules. So what describes
a product is kept in the form in which the kernel reads it.
"""

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from . import cpu

_SIZES, _NORM, _PRODUCT = struct.Struct("6q3P"), struct.Struct("2Pd"), struct.Struct("3q4PqPPPq")  # as in layer.cpp


def norm(scale: Tensor | None, shift: Tensor | None, eps: float) -> bytes:
    """A layer norm with scale and shift (C,), which are not copied."""
    return _NORM.pack(_address(scale), _address(shift), eps)


def product(
    codes: Tensor,
    affine: Tensor,
    bias: Tensor | None,
    grid: Tensor | None,
    centroids: tuple[Tensor, Tensor, Tensor] | None = None,
) -> bytes:
    """A product with a weight in 8 bits. Nothing is copied: the tensors have to stay where they are.

    Args:
        codes: (O, I) uint8, or of centroids (I/d, O); contiguous, as all of them.
        affine: (2, 1) or (2, O) float32, scales and zero points.
        bias: (O,) float32, or None.
        grid: (2,) float32, scale and zero point of the input; by default each row has its own.
        centroids: in bytes (256, d) uint8; the numbers (K, d) float32 themselves; and those that the bytes are of.
    """
    at = _address(codes), _address(affine), _address(bias)
    if centroids is None:
        rows, inner = codes.shape
        return _PRODUCT.pack(rows, 0, affine.shape[1], at[0], 0, *at[1:], inner, _address(grid), 0, 0, 0)
    in_bytes, now, then = centroids
    (blocks, rows), d = codes.shape, now.shape[1]
    rest = blocks * d, _address(grid), _address(now), _address(then), now.numel()
    return _PRODUCT.pack(rows, d, 1, at[0], _address(in_bytes), *at[1:], *rest)


def encoder_layer(
    x: Tensor,
    heads: int,
    normalize_before: bool,
    gelu: bool,
    seen: Tensor | None,
    norms: Sequence[bytes],
    products: Sequence[bytes],
) -> Tensor | None:
    """A layer where the compiled kernels are there, which is for the caller to see (`takes_integers`).

    Args:
        x: (B, T, C) float32, contiguous.
        heads: a divisor of C.
        normalize_before: norms come before the two blocks, not after them.
        gelu: the feed-forward block has GELU, not ReLU.
        seen: (B, T) bool, contiguous: false for a key that no token sees; None where all are seen.
        norms: of attention and of the feed-forward block (`norm`).
        products: for query, key, value and output of the attention, and the two of the feed-forward block (`product`).

    Returns:
        (B, T, C); None where centroids have changed since they were rounded to bytes.
    """
    batch, tokens, dim = x.shape
    out = torch.empty_like(x)
    at = _address(seen), x.data_ptr(), out.data_ptr()
    sizes = _SIZES.pack(batch, tokens, dim, heads, normalize_before, gelu, *at)
    done = cpu.library().encoder_layer(b"".join((sizes, *norms, *products)), torch.get_num_threads())
    return out if done else None


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
