"""psi, the noise operator: a random set of blocks is distorted, with straight-through gradients.

    psi(b_kl | J) = phi(b_kl)  if (k, l) in J,  else b_kl          (arXiv 2004.07320, equation 4)

J is drawn anew for each forward; each block is in J with probability p. Blocks outside J are left as they are
(nothing is rescaled by 1/(1-p)). The gradient with respect to psi(W) goes to W unchanged.
"""

import torch
from torch import Tensor

from ..utils.autograd import StraightThrough
from ..weights.blocks import as_blocks
from .distortions import Distortion


def draw_blocks(n_blocks: int, p: float, generator: torch.Generator) -> Tensor:
    """J: an (n,) bool mask on the generator's device in which each block is hit with probability p.

    On a CPU, a draw of 64 bits decides on four blocks, which takes a quarter of the time of one each; p then counts in
    steps of 2^-16.
    """
    if generator.device.type != "cpu":
        mask = torch.empty(n_blocks, dtype=torch.bool, device=generator.device)
        return mask.bernoulli_(p, generator=generator)
    words = torch.empty(-(-n_blocks // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    threshold = round(p * 2**16) - 2**15
    return (
        words.view(torch.int16)[:n_blocks] < threshold if threshold < 2**15 else torch.ones(n_blocks, dtype=torch.bool)
    )


def draw_clusters(codes: Tensor, n_centroids: int, p: float, generator: torch.Generator) -> Tensor:
    """J by centroid: each of the K is hit with probability p, and all its blocks with it.

    Args:
        codes: (n,) whole numbers, each block's centroid.
        n_centroids: K.
        p: from 0 to 1.
        generator: draws the centroids.

    Returns:
        (n,) bool, on the generator's device.
    """
    return draw_blocks(n_centroids, p, generator).index_select(0, codes.to(generator.device).long())


def psi(weight: Tensor, hit: Tensor | None, block_size: int, phi: Distortion) -> Tensor:
    """The noised weight, of the shape and dtype of `weight`, with the straight-through gradient.

    Args:
        weight: (rows, …), the stored weight; it is not written to.
        hit: (n,) bool, true for the blocks in J; None for all of them.
        block_size: d, with n * d = weight.numel().
        phi: the distortion.
    """
    with torch.no_grad():
        blocks = as_blocks(weight, block_size)  # (n, d)
        distorted = phi(blocks, hit)
        if hit is not None:
            distorted = torch.where(hit.unsqueeze(1), distorted, blocks)
        distorted = distorted.reshape(weight.shape)
    return StraightThrough.apply(weight, distorted)  # type: ignore[no-untyped-call]
