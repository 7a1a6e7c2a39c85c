"""The inner loops: each has one signature and several forms, of which one is chosen at run time.

The forms are plain torch (`reference.py`), C++ for a CPU, compiled where there is a compiler (`cpu.py`), and Triton on
a GPU (`gpu.py`).

    nearest(points, centroids, weights)    the E-step of k-means; the forms have its core, `least`
    decode(codes, centroids)               a weight from its codes
    linear(x, codes, centroids, bias)      a product with a weight in codes, without decoding it

`FAIRSEQ_QUANT_NOISE_KERNELS=reference` in the environment turns the CPU's compiled form off.
"""

import torch
from torch import Tensor

from . import cpu, gpu, reference
from .cpu import SETTLED

__all__ = ["SETTLED", "decode", "linear", "nearest", "takes_linear"]


def nearest(points: Tensor, centroids: Tensor, weights: Tensor | None = None) -> Tensor:
    """For each point b the nearest centroid, the first one where several are.

    argmin_k sum_j h_j (b_j - c_kj)^2 = argmin_k sum_j h_j c_kj^2 - 2 h_j b_j c_kj,   h the point's weights, 1 without.

    Args:
        points: (n, d) float32 or float64.
        centroids: (K, d), of the same dtype.
        weights: (n, d), of the same dtype, 0 or more.

    Returns:
        (n,) int64.
    """
    squares, slope = centroids.square(), centroids.t() * -2  # (K, d), (d, K)
    bias = squares.sum(1)  # (K,)
    if weights is not None:
        points, slope = torch.cat([weights * points, weights], 1), torch.cat([slope, squares.t()])  # (n, 2 d), (2 d, K)
        bias = torch.zeros_like(bias)
    form = cpu if cpu.takes(points) else reference
    return form.least(points, slope, bias)


def decode(codes: Tensor, centroids: Tensor) -> Tensor:
    """A weight from its codes, without a gradient.

    Args:
        codes: (O, I/d) uint8, of any strides.
        centroids: (K, d).

    Returns:
        (O, I), of the centroids' dtype.
    """
    form = cpu if centroids.dtype == torch.float32 and cpu.takes(centroids) else reference
    return form.decode(codes, centroids)


def takes_linear(x: Tensor, centroids: Tensor) -> bool:
    """Whether `linear` has a form for x (..., I) and centroids (K, d) that is faster than decoding the weight."""
    if x.numel() == 0 or x.dtype != centroids.dtype or len(centroids) > 256:
        return False
    return (x.dtype == torch.float32 and cpu.takes(x)) or gpu.takes(x)


def linear(x: Tensor, codes: Tensor, centroids: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W_hat^T + bias, with W_hat[o] the centroids of the codes of row o, end to end.

    Args:
        x: (..., I) float32; on a GPU also float16 or bfloat16.
        codes: (I/d, O) uint8, a row for each block of the input ("block-major").
        centroids: (K, d), K at most 256.
        bias: (O,), or None.

    Returns:
        (..., O).
    """
    form = cpu if cpu.takes(x) else gpu if gpu.takes(x) else reference
    return form.linear(x, codes, centroids, bias)
