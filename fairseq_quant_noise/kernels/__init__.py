"""The inner loops, each with one signature and several forms: plain torch (`reference.py`), and compiled for a CPU
(`cpu.py`), which is chosen at run time where the tensors are on a CPU and a C++ compiler is at hand.

    nearest(points, centroids)             the E-step of k-means
    decode(codes, centroids)               a weight out of its codes
    linear(x, codes, centroids, bias)      a product with a weight in codes, without decoding it

`FAIRSEQ_QUANT_NOISE_KERNELS=reference` in the environment turns the compiled form off.
"""

import torch
from torch import Tensor

from . import cpu, reference


def nearest(points: Tensor, centroids: Tensor) -> Tensor:
    """For each point the nearest centroid: argmin_k || c_k ||^2 - 2 b.c_k, the first one where several are least.

    Args:
        points: (n, d) float32 or float64.
        centroids: (K, d), of the same dtype.
    Returns:
        (n,) int64.
    """
    form = cpu if cpu.takes(points) else reference
    return form.nearest(points, centroids)


def decode(codes: Tensor, centroids: Tensor) -> Tensor:
    """A weight out of its codes, without a gradient.

    Args:
        codes: (O, I/d) uint8, of any strides.
        centroids: (K, d).
    Returns:
        (O, I), of the centroids' dtype.
    """
    form = cpu if centroids.dtype == torch.float32 and cpu.takes(centroids) else reference
    return form.decode(codes, centroids)


def takes_linear(x: Tensor, centroids: Tensor) -> bool:
    """Whether `linear` has a form for this input that is faster than decoding the weight."""
    return x.numel() > 0 and x.dtype == centroids.dtype == torch.float32 and len(centroids) <= 256 and cpu.takes(x)


def linear(x: Tensor, codes: Tensor, centroids: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W_hat^T + bias, with W_hat[o] the centroids of the codes of row o, end to end.

    Args:
        x: (..., I) float32.
        codes: (I/d, O) uint8, a row for each block of the input ("block-major").
        centroids: (K, d), K at most 256.
        bias: (O,), or None.
    Returns:
        (..., O).
    """
    form = cpu if cpu.takes(x) else reference
    return form.linear(x, codes, centroids, bias)
