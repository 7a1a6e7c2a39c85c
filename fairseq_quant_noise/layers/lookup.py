"""The look-up of a weight's blocks in its codebook, with the gradients of the centroids and of a latent weight."""

from typing import Any

import torch
from torch import Tensor

#: A centroid's gradient is the sum over its n blocks, divided by n to this power. 0 is the sum, as in the paper's
#: code, 1 the mean, as in kill-the-bits (arXiv 1907.05686, section 3.4). In between, the learning rate that the paper's
#: authors published is the best of those tried for clusters of 10 to 8,000 blocks (docs/how_it_works.md).
GRADIENT_POWER = 0.5


class Lookup(torch.autograd.Function):
    """centroids[codes], with the gradient of a centroid scaled by the number of blocks that use it, in all weights."""

    @staticmethod
    def forward(
        ctx: Any, centroids: Tensor, seen: Tensor, codes: Tensor, count: Tensor, latent: Tensor | None
    ) -> Tensor:
        """The rows (n, d) of `seen` (K, d), the centroids or their 8-bit rounding, at codes (n,); `count` is (K, 1)."""
        ctx.save_for_backward(codes, count)
        ctx.n_centroids = centroids.shape[0]
        ctx.latent_shape = None if latent is None else latent.shape
        return seen.index_select(0, codes)  # (n, d)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, Tensor | None]:
        """The gradient (K, d) of the centroids, from that of the rows (n, d), which is the latent weight's."""
        codes, count = ctx.saved_tensors
        gradient = gradients[0].float()  # sums over thousands of blocks overflow or drown in half precision
        total = gradient.new_zeros(ctx.n_centroids, gradient.shape[1]).index_add_(0, codes, gradient)  # (K, d)
        through = None if ctx.latent_shape is None else gradients[0].view(ctx.latent_shape)
        return (total / count**GRADIENT_POWER).to(gradients[0].dtype), None, None, None, through
