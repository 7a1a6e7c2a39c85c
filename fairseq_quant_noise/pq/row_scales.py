"""A scale for each row of a product-quantized weight: W_hat[row r, block i] = s_r c_{I_ri}.

Rows of a weight differ in size, and without scales a codebook must hold centroids for all sizes. The error that is
minimized stays the weight's,

    sum_rj h_rj (W_rj - s_r c_rj)^2  =  sum_rj h_rj s_r^2 (W_rj / s_r - c_rj)^2

so k-means gets the blocks of W_rj / s_r, and weights h_rj s_r^2. The scales start at the root mean square of a row over
that of all rows: so centroids keep the size of the weight's numbers, and learning rates their meaning. For codes and
centroids, the scales of least error are

    s_r = sum_j h_rj W_rj c_rj / sum_j h_rj c_rj^2

Shapes: O rows of I numbers, n blocks of d.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

LEAST, MOST = 2.0**-12, 2.0**12  # of a scale when it is found: fp16 holds it and its inverse with all digits


def first_scales(weights: Sequence[Tensor]) -> list[Tensor]:
    """The scales that weights of one codebook start from; 1 for a row of zeros.

    Args:
        weights: each (O, …), finite.

    Returns:
        For each weight (O,) float32, exact in fp16.
    """
    squares = [weight.detach().double().flatten(1).square() for weight in weights]
    mean = sum(float(part.sum()) for part in squares) / sum(part.numel() for part in squares)
    rows = [part.mean(1) for part in squares]  # (O,) each
    return [_rounded(torch.where(own > 0, (own / (mean or 1.0)).sqrt(), 1.0)) for own in rows]


def of_rows(scales: Tensor, weight: Tensor) -> Tensor:
    """Scales (O,) in the shape that multiplies a weight (O, …): (O, 1, …)."""
    return scales.view(-1, *[1] * (weight.dim() - 1))


def fitted_scales(wanted: Tensor, seen: Tensor, slope: Tensor, scales: Tensor) -> Tensor:
    """The scales of least error for rows of centroids.

    Args:
        wanted: W, (O, I).
        seen: c, the centroids of each row's codes, end to end: (O, I).
        slope: h c; or c M, where a matrix M weighs products of errors: (O, I).
        scales: (O,), which stay where a row's centroids are all 0.

    Returns:
        (O,) float32, exact in fp16.
    """
    slope = slope.double()
    whole = (slope * seen).sum(1)  # (O,)
    best = (slope * wanted).sum(1) / torch.where(whole > 0, whole, 1.0)
    return _rounded(torch.where(whole > 0, best, scales.double()))


def _rounded(scales: Tensor) -> Tensor:
    return scales.clamp(LEAST, MOST).half().float()
