"""The product with a weight in codes on a GPU, in Triton, which comes with torch's CUDA builds.

It takes a few rows of x, where reading a dense weight is what takes the time: it reads codes, and a codebook that stays
in the cache. With more rows the weight is decoded and multiplied as usual. Without Triton `reference.py` is used.
"""

import functools
import importlib.util

import torch
from torch import Tensor

from .tracing import in_graph

_MOST_ROWS = 8  # rows of x that the kernel takes
_ROWS, _BLOCKS = 64, 16  # rows and blocks of the weight that one program handles
_PROGRAMS = 512  # enough to fill a GPU: with fewer rows than that gives, the blocks are split too


def takes(x: Tensor) -> bool:
    """Whether this form is there for `x` (..., I), and faster than decoding."""
    few = x.numel() <= _MOST_ROWS * x.shape[-1]
    return few and x.device.type == "cuda" and x.dtype in _DTYPES and (in_graph() or _installed())


_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def linear(x: Tensor, codes: Tensor, centroids: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `kernels.linear`, for x (..., I), codes (I/d, O) uint8, centroids (K, d) and bias (O,): (..., O).

    Sums are in float32 and in one order, whatever the GPU.
    """
    (blocks, rows), (k, d) = codes.shape, centroids.shape
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    n, tiles = len(flat), -(-rows // _ROWS)
    splits = max(1, min(_PROGRAMS // tiles, blocks // _BLOCKS))
    share = -(-blocks // splits)
    sums = torch.empty(splits, n, rows, device=x.device, dtype=torch.float32)
    from .gpu_lookup import lookup  # imports triton

    lookup[(tiles, splits)](
        *(flat, codes.contiguous(), centroids.contiguous(), sums, n, rows, blocks, share, k),
        N=1 << (n - 1).bit_length(),
        D=d,
        ROWS=_ROWS,
        BLOCKS=_BLOCKS,
    )
    out = sums.sum(0)  # (n, rows)
    return (out if bias is None else out + bias).to(x.dtype).view(*x.shape[:-1], rows)
