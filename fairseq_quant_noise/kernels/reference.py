"""The kernels in plain torch, on any device; the other forms are tested against them."""

import torch
import torch.nn.functional as F
from torch import Tensor

CPU_SCORES, GPU_SCORES = 1 << 20, 1 << 24  # distances at a time: on a CPU they stay in its cache


def least(points: Tensor, slope: Tensor, bias: Tensor) -> Tensor:
    """argmin_k bias_k + points_i . slope_k for (n, d), (d, K) and (K,), the first one where several are least: (n,)."""
    rank = torch.arange(len(bias), 0, -1, device=points.device, dtype=points.dtype)  # (K,)
    rows = min(len(points), (CPU_SCORES if points.device.type == "cpu" else GPU_SCORES) // len(rank))
    buffer, best = points.new_empty(rows, len(rank)), points.new_empty(len(points))  # (rows, K), (n,)
    for chunk, out in zip(points.split(rows), best.split(rows), strict=True):
        score = torch.addmm(bias, chunk, slope, out=buffer[: len(chunk)])  # (rows, K)
        # argmin is not vectorized on a CPU, amin is: to mark the least and read its rank is twice as fast.
        torch.amax(score.eq_(score.amin(1, keepdim=True)).mul_(rank), 1, out=out)  # (rows,)
    return len(rank) - best.long()


def decode(codes: Tensor, centroids: Tensor) -> Tensor:
    """As `kernels.decode`, for codes (O, I/d) uint8 or int32 and centroids (K, d): (O, I)."""
    return centroids.index_select(0, codes.flatten().long()).view(codes.shape[0], -1)


def linear(x: Tensor, codes: Tensor, centroids: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `kernels.linear`, for x (..., I), codes (I/d, O) uint8, centroids (K, d) and bias (O,): (..., O)."""
    return F.linear(x, decode(codes.t(), centroids), bias)


def linear_of_codes(
    x: Tensor, codes: Tensor, affine: Tensor, bias: Tensor | None = None, grid: Tensor | None = None
) -> Tensor:
    """As `kernels.linear_of_codes`, for x (..., I), codes (O, I), affine (2, C), bias (O,) and grid (2,): (..., O)."""
    return F.linear(_rounded(x, grid), dense(codes, affine), bias)


def linear_of_centroids(
    x: Tensor,
    codes: Tensor,
    centroids: Tensor,
    affine: Tensor,
    bias: Tensor | None = None,
    grid: Tensor | None = None,
) -> Tensor:
    """As `kernels.linear_of_centroids`, for x (..., I), codes (I/d, O), centroids (256, d), affine (2, 1): (..., O)."""
    return linear_of_codes(x, decode(codes.t(), centroids), affine, bias, grid)


def dense(codes: Tensor, affine: Tensor) -> Tensor:
    """(codes - z) s, for codes (O, I) and affine (2, 1) or (2, O): (O, I) float32."""
    scale, zero = affine.unsqueeze(-1)  # (C, 1) each
    return (codes - zero) * scale


def _rounded(x: Tensor, grid: Tensor | None) -> Tensor:
    """x (..., I) in 8 bits and back: by the grid (2,), scale and zero point, or by a range for each row."""
    if grid is not None:
        scale, zero = grid
    else:
        low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)  # (..., 1)
        scale = high / 255 - low / 255
        scale = torch.where(scale == 0, torch.ones_like(scale), scale.clamp(min=2.0**-100))
        zero = (-low / scale).round()
    return ((x * (1 / scale)).round().add(zero).clamp(0, 255) - zero) * scale
