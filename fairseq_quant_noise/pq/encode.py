"""Encode a weight as codes and centroids."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from ..kernels import nearest as nearest_centroid
from ..weights.blocks import as_blocks, code_shape
from .kmeans import kmeans

ITERATIONS = 20  # k-means iterations, the paper's setting
FP16_MAX = 65504.0
FLOOR = 1e-4  # least importance of a number, as a share of the mean


@dataclass(frozen=True)
class Encoded:
    """A product-quantized weight."""

    codes: Tensor  # (rows, blocks a row) uint8, or int32 where K is above 256
    centroids: Tensor  # (K, d) float32
    relative_error: float  # ||W - W_hat|| / ||W||, Frobenius norms


def encode(
    name: str,
    weight: Tensor,
    block_size: int,
    n_centroids: int,
    *,
    seed: int = 0,
    importance: Tensor | None = None,
    iterations: int = ITERATIONS,
) -> Encoded:
    """Quantize `weight` by k-means over all its blocks.

    Args:
        name: the weight's name, for messages.
        weight: (rows, …), with rows that `block_size` divides (see `blocks.check_block_size`).
        block_size: d.
        n_centroids: K, at most 4096 and at most the number of blocks.
        seed: of k-means; with the same weight and importance it gives the same bits.
        importance: of the numbers' squared errors (`quantization/importance.py`), of the weight's shape; all alike
            without.
        iterations: of k-means.

    Raises:
        UserError: the weight holds NaN or infinity, or values that fp16 centroids cannot hold; K is not in 1 .. 4096.
    """
    sizes = block_size, n_centroids
    return encode_together([name], [weight], *sizes, seed=seed, importance=[importance], iterations=iterations)[0]


def encode_together(
    names: Sequence[str],
    weights: Sequence[Tensor],
    block_size: int,
    n_centroids: int,
    *,
    seed: int,
    importance: Sequence[Tensor | None],
    iterations: int = ITERATIONS,
) -> list[Encoded]:
    """`encode` of several weights with one codebook, by k-means over the blocks of all.

    Importance is compared across the weights too; where one of them has none, all errors of all weights count alike.

    Args:
        names: the weights' names, for messages.
        weights: each (rows, …), with rows that `block_size` divides.
        block_size: d.
        n_centroids: K.
        seed: of k-means.
        importance: for each weight one of its shape, or None.
        iterations: of k-means.

    Returns:
        For each weight its codes (rows, blocks a row), with the centroids (K, d) that all have in common.

    Raises:
        UserError: a weight holds NaN or infinity, or values that fp16 centroids cannot hold; K is not in 1 .. 4096.
    """
    weights = [weight.detach() for weight in weights]
    for name, weight in zip(names, weights, strict=True):
        _check(name, weight)
    blocks = torch.cat([as_blocks(weight, block_size) for weight in weights])  # (n, d)
    given = [tensor for tensor in importance if tensor is not None]
    counts = None
    if len(given) == len(weights):
        counts = _normalized(torch.cat([as_blocks(tensor.to(blocks.device), block_size) for tensor in given]))
    found = kmeans(blocks, n_centroids, iterations=iterations, seed=seed, weights=counts)
    parts = found.codes.split([weight.numel() // block_size for weight in weights])
    encoded = []
    for weight, codes in zip(weights, parts, strict=True):
        exact = as_blocks(weight, block_size).double()
        away = torch.linalg.vector_norm(exact - found.centroids.double()[codes.long()]).item()
        norm = torch.linalg.vector_norm(exact).item()
        shaped = codes.view(code_shape(tuple(weight.shape), block_size))
        encoded.append(Encoded(shaped, found.centroids, away / norm if norm else 0.0))
    return encoded


def _check(name: str, weight: Tensor) -> None:
    largest = weight.abs().max().item()
    if not math.isfinite(largest):
        raise UserError(f"{name}: the weight holds NaN or infinity; quantize a checkpoint from before it diverged")
    if largest > FP16_MAX:
        raise UserError(f"{name}: a weight of {largest:.3g} does not fit fp16 centroids (at most {FP16_MAX:.0f})")


def _normalized(importance: Tensor) -> Tensor | None:
    """Weights for k-means, their mean 1; None where all are 0."""
    mean = importance.double().mean()
    return (importance.double() / mean).clamp(min=FLOOR).float() if mean > 0 else None


def nearest(blocks: Tensor, centroids: Tensor) -> Tensor:
    """For each of the (n, d) blocks the nearest of the (K, d) centroids: (n,) int64, distances in float32."""
    if not len(blocks):
        return torch.zeros(0, dtype=torch.long, device=blocks.device)
    exponent = int(torch.maximum(blocks.abs().max().float(), centroids.abs().max().float()).frexp().exponent)
    scale = 2.0 ** min(-exponent, 126)  # exact, and keeps squares in float32's range
    return nearest_centroid(blocks.float() * scale, centroids.float() * scale)
