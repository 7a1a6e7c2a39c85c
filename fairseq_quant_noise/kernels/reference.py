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
    """As `kernels.decode`, for codes (O, I/d) uint8 and centroids (K, d): (O, I)."""
    return centroids.index_select(0, codes.flatten().long()).view(codes.shape[0], -1)


def linear(x: Tensor, codes: Tensor, centroids: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `kernels.linear`, for x (..., I), codes (I/d, O) uint8, centroids (K, d) and bias (O,): (..., O)."""
    return F.linear(x, decode(codes.t(), centroids), bias)
