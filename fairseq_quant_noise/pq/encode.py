"""A weight to codes and centroids."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..blocks import as_blocks, code_shape
from ..errors import UserError
from ..kernels import nearest as nearest_centroid
from .kmeans import kmeans

ITERATIONS = 20  # of k-means, the paper's setting
FP16_MAX = 65504.0


@dataclass(frozen=True)
class Encoded:
    """A product-quantized weight."""

    codes: Tensor  # (rows, blocks a row) uint8
    centroids: Tensor  # (K, d) float32
    relative_error: float  # ||W - W_hat|| / ||W||, Frobenius norms


def encode(name: str, weight: Tensor, block_size: int, n_centroids: int, *, seed: int = 0) -> Encoded:
    """Quantize `weight` by k-means over all its blocks.

    Args:
        name: the weight's name, for messages.
        weight: of any shape that `block_size` divides (see `blocks.check_block_size`).
        block_size: d.
        n_centroids: K, at most 256 and at most the number of blocks.
        seed: of k-means; with the same weight it gives the same bits.
    Raises:
        UserError: the weight holds NaN or infinity, or values that fp16 centroids cannot hold.
    """
    weight = weight.detach()
    largest = weight.abs().max().item()
    if not math.isfinite(largest):
        raise UserError(f"{name}: the weight holds NaN or infinity; quantize a checkpoint from before it diverged")
    if largest > FP16_MAX:
        raise UserError(f"{name}: a weight of {largest:.3g} does not fit fp16 centroids (at most {FP16_MAX:.0f})")
    found = kmeans(as_blocks(weight, block_size), n_centroids, iterations=ITERATIONS, seed=seed)
    norm = torch.linalg.vector_norm(weight.double()).item()
    error = math.sqrt(found.sse) / norm if norm else 0.0
    return Encoded(found.codes.view(code_shape(tuple(weight.shape), block_size)), found.centroids, error)


def nearest(blocks: Tensor, centroids: Tensor) -> Tensor:
    """For each of the (n, d) blocks the nearest of the (K, d) centroids: (n,) int64, distances in float32."""
    if not len(blocks):
        return torch.zeros(0, dtype=torch.long, device=blocks.device)
    exponent = int(torch.maximum(blocks.abs().max().float(), centroids.abs().max().float()).frexp().exponent)
    scale = 2.0 ** min(-exponent, 126)  # exact, and keeps squares in float32's range
    return nearest_centroid(blocks.float() * scale, centroids.float() * scale)
