"""The look-up of a weight's blocks in its codebook, with the gradients of the centroids and of a latent weight."""

from typing import Any

import torch
from torch import Tensor

#: A centroid's gradient is the sum over its n blocks, divided by n to this power. 0 is the sum, as in the paper's
#: code, 1 the mean, as in kill-the-bits (arXiv 1907.05686, section 3.4). In between, the learning rate that the paper's
#: authors published is the best of those tried for clusters of 10 to 8,000 blocks (docs/how_it_works.md).
GRADIENT_POWER = 0.5


class Lookup(torch.autograd.Function):
    """s_r centroids[codes], with the gradient of a centroid scaled by the number of blocks that use it, in all weights.

    Rows without scales have s_r = 1. A centroid's gradient is sum_i s_i g_i over its blocks i, that of a scale
    sum_j g_rj c_rj over its row; the latent weight takes g, the gradient of the weight, as it is.
    """

    @staticmethod
    def forward(
        ctx: Any,
        centroids: Tensor,
        seen: Tensor,
        codes: Tensor,
        count: Tensor,
        latent: Tensor | None,
        scales: Tensor | None,
    ) -> Tensor:
        """The weight (O, I): the rows of `seen` (K, d), the centroids or their 8-bit rounding, at codes (O, I/d) int64.

        `count` is (K, 1), `scales` (O,).
        """
        ctx.save_for_backward(codes, count, *(() if scales is None else (seen, scales)))
        ctx.n_centroids = centroids.shape[0]
        ctx.latent_shape = None if latent is None else latent.shape
        rows = _rows(seen, codes)
        return rows if scales is None else rows * scales[:, None]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients (K, d) of the centroids and (O,) of the scales, from that of the rows (O, I), the latent's."""
        codes, count, *scaled = ctx.saved_tensors
        through = None if ctx.latent_shape is None else gradients[0].view(ctx.latent_shape)
        gradient = gradients[0].float()  # sums over thousands of blocks overflow or drown in half precision
        of_scales = None
        if scaled:
            seen, scales = scaled
            of_scales = (gradient * _rows(seen, codes)).sum(1).to(scales.dtype)  # (O,)
            gradient = gradient * scales[:, None]
        flat = codes.flatten()  # (n,)
        total = gradient.new_zeros(ctx.n_centroids, gradient.numel() // len(flat))  # (K, d)
        total.index_add_(0, flat, gradient.reshape(len(flat), -1))
        of_centroids = (total / count**GRADIENT_POWER).to(gradients[0].dtype)
        return of_centroids, None, None, None, through, of_scales


def _rows(centroids: Tensor, codes: Tensor) -> Tensor:
    """The centroids (K, d) of codes (O, I/d), end to end: (O, I)."""
    return centroids.index_select(0, codes.flatten()).view(len(codes), -1)
