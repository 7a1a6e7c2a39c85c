"""The inner loops: each has one signature and several forms, of which one is chosen at run time.

The forms are plain torch (`reference.py`), C++ for a CPU, compiled where there is a compiler (`cpu.py`), and Triton on
a GPU (`gpu.py`).

    nearest(points, centroids, weights)    the E-step of k-means; the forms have its core, `least`
    decode(codes, centroids)               a weight from its codes
    linear(x, codes, centroids, bias)      a product with a weight in codes, without decoding it
    Prepared                               a weight in codes made ready for many products, on a CPU
    linear_of_codes, linear_of_centroids   the same with both in 8 bits, on a CPU

In a graph of torch.compile or torch.export a product is an operator (`operators.py`).

`FAIRSEQ_QUANT_NOISE_KERNELS=reference` in the environment turns the CPU's compiled form off.
"""

import torch
from torch import Tensor

from . import cpu, gpu, operators, reference
from .cpu import SETTLED
from .prepared import Prepared
from .tracing import in_graph

__all__ = [
    "LONGEST",
    "SETTLED",
    "Prepared",
    "decode",
    "in_graph",
    "linear",
    "linear_of_centroids",
    "linear_of_codes",
    "nearest",
    "takes_integers",
    "takes_linear",
]

LONGEST = 1 << 15  # a row of the weight: the sum of so many products of two numbers of 8 bits fits 32 bits


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
    form = cpu if not in_graph() and cpu.takes(points) else reference
    return form.least(points, slope, bias)


def decode(codes: Tensor, centroids: Tensor) -> Tensor:
    """A weight from its codes, without a gradient.

    Args:
        codes: (O, I/d) uint8, of any strides; int32 where K is above 256.
        centroids: (K, d).

    Returns:
        (O, I), of the centroids' dtype.
    """
    fits = centroids.dtype == torch.float32 and not in_graph() and cpu.takes(centroids)
    form = cpu if fits else reference  # which a graph can hold
    return form.decode(codes, centroids)


def takes_linear(x: Tensor, centroids: Tensor) -> bool:
    """Whether `linear` has a form for x (..., I) and centroids (K, d) that is faster than decoding the weight."""
    if x.numel() == 0 or x.dtype != centroids.dtype:
        return False
    return (x.dtype == torch.float32 and cpu.takes(x)) or (len(centroids) <= 256 and gpu.takes(x))


def linear(x: Tensor, codes: Tensor, centroids: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W_hat^T + bias, with W_hat[o] the centroids of the codes of row o, end to end.

    Args:
        x: (..., I) float32; on a GPU also float16 or bfloat16.
        codes: (I/d, O) uint8, a row for each block of the input ("block-major"); on a CPU int32 where K is above 256.
        centroids: (K, d).
        bias: (O,), or None.

    Returns:
        (..., O).
    """
    found: Tensor = (operators if in_graph() else operators.form_of(x)).linear(x, codes, centroids, bias)
    return found


def takes_integers(x: Tensor) -> bool:
    """Whether `linear_of_codes` and `linear_of_centroids` have a fast form for x (..., I)."""
    return x.dtype == torch.float32 and 0 < x.shape[-1] <= LONGEST and x.numel() > 0 and cpu.takes(x)


def linear_of_codes(
    x: Tensor, codes: Tensor, affine: Tensor, bias: Tensor | None = None, grid: Tensor | None = None
) -> Tensor:
    """x_hat W_hat^T + bias, W_hat = (codes - z) s, and x_hat the input rounded to 8 bits; summed in whole numbers.

    Args:
        x: (..., I) float32.
        codes: (O, I) uint8.
        affine: (2, 1) or (2, O) float32, s and z of the weight.
        bias: (O,), or None.
        grid: (2,) float32, scale and zero point of the input. By default each row of I numbers has its own, from its
            least to its largest number, 0 included.

    Returns:
        (..., O). A row of x that is not finite gives NaN.
    """
    if in_graph():
        return operators.linear_of_codes(x, codes, affine, bias, grid)
    return (cpu if takes_integers(x) else reference).linear_of_codes(x, codes, affine, bias, grid)


def linear_of_centroids(
    x: Tensor,
    codes: Tensor,
    centroids: Tensor,
    affine: Tensor,
    bias: Tensor | None = None,
    grid: Tensor | None = None,
) -> Tensor:
    """As `linear_of_codes`, with W_hat of centroids in 8 bits.

    Args:
        x: (..., I) float32.
        codes: (I/d, O) uint8, a row for each block of the input.
        centroids: (256, d) uint8, one for every code that a byte can be.
        affine: (2, 1) float32, their scale and zero point.
        bias: (O,), or None.
        grid: as there.

    Returns:
        (..., O).
    """
    if in_graph():
        return operators.linear_of_centroids(x, codes, centroids, affine, bias, grid)
    return (cpu if takes_integers(x) else reference).linear_of_centroids(x, codes, centroids, affine, bias, grid)
