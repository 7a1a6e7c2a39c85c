"""Encode a weight as codes and centroids."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..kernels import nearest as nearest_centroid
from ..weights.blocks import as_blocks, code_shape
from .kmeans import Clustering, kmeans
from .row_scales import first_scales, fitted_scales

ITERATIONS = 20  # k-means iterations, the paper's setting
FP16_MAX = 65504.0
ROUNDS, AGAIN = 2, 5  # with row scales: of k-means and fitting the scales; iterations after the first round
FLOOR = 1e-4  # least importance of a number, as a share of the mean


@dataclass(frozen=True)
class Encoded:
    """A product-quantized weight."""

    codes: Tensor  # (rows, blocks a row) uint8, or int32 where K is above 256
    centroids: Tensor  # (K, d) float32
    relative_error: float  # ||W - W_hat|| / ||W||, Frobenius norms
    scales: Tensor | None = None  # (rows,) float32, exact in fp16, where rows have them (`row_scales.py`)

    def cpu(self) -> "Encoded":
        """The same in the memory of the CPU."""
        scales = None if self.scales is None else self.scales.cpu()
        return Encoded(self.codes.cpu(), self.centroids.cpu(), self.relative_error, scales)


def encode(
    name: str,
    weight: Tensor,
    block_size: int,
    n_centroids: int,
    *,
    seed: int = 0,
    importance: Tensor | None = None,
    iterations: int = ITERATIONS,
    row_scales: bool = False,
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
        row_scales: give each row a scale (`row_scales.py`).

    Raises:
        UserError: the weight holds NaN or infinity, or values that fp16 centroids cannot hold; K is not in 1 .. 4096.
    """
    how: dict[str, Any] = {"seed": seed, "iterations": iterations, "row_scales": row_scales}
    return encode_together([name], [weight], block_size, n_centroids, importance=[importance], **how)[0]


def encode_together(
    names: Sequence[str],
    weights: Sequence[Tensor],
    block_size: int,
    n_centroids: int,
    *,
    seed: int,
    importance: Sequence[Tensor | None],
    iterations: int = ITERATIONS,
    row_scales: bool = False,
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
        row_scales: give each row of each weight a scale (`row_scales.py`).

    Returns:
        For each weight its codes (rows, blocks a row), with the centroids (K, d) that all have in common; and its
        scales (rows,).

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
    scales: Sequence[Tensor | None] = [None] * len(weights)
    if row_scales:
        found, scales = _with_scales(weights, blocks, counts, n_centroids, iterations, seed)
    else:
        found = kmeans(blocks, n_centroids, iterations=iterations, seed=seed, weights=counts)
    parts = found.codes.split([weight.numel() // block_size for weight in weights])
    return [
        _encoded(weight, codes.view(code_shape(tuple(weight.shape), block_size)), found.centroids, of_weight)
        for weight, codes, of_weight in zip(weights, parts, scales, strict=True)
    ]


def _with_scales(
    weights: Sequence[Tensor], blocks: Tensor, counts: Tensor | None, n_centroids: int, iterations: int, seed: int
) -> tuple[Clustering, list[Tensor]]:
    """k-means of blocks (n, d) over the scales of their rows, and the scales (O,) of each weight (O, …).

    `counts` is what the squared error of each number counts, (n, d).
    """
    sizes = [weight.numel() // blocks.shape[1] for weight in weights]  # blocks of each
    scales, start = first_scales(weights), None
    for _ in range(ROUNDS):
        repeated = [s.repeat_interleave(size // len(s)) for s, size in zip(scales, sizes, strict=True)]
        of_blocks = torch.cat(repeated)[:, None]  # (n, 1)
        squares = of_blocks.square().expand_as(blocks) if counts is None else counts * of_blocks.square()
        over = blocks / of_blocks
        found = kmeans(over, n_centroids, iterations=iterations, seed=seed, start=start, weights=squares)
        start, iterations = found.centroids, AGAIN
        seen = found.centroids[found.codes.long()]  # (n, d)
        slope = seen if counts is None else counts * seen
        each = zip(blocks.split(sizes), seen.split(sizes), slope.split(sizes), scales, strict=True)
        scales = [fitted_scales(w.view(len(s), -1), c.view(len(s), -1), hc.view(len(s), -1), s) for w, c, hc, s in each]
    return found, scales


def _encoded(weight: Tensor, codes: Tensor, centroids: Tensor, scales: Tensor | None) -> Encoded:
    """With the relative error of a weight (O, …), for codes (O, blocks a row), centroids (K, d) and scales (O,)."""
    exact = weight.double().flatten(1)  # (O, I)
    seen = centroids.double()[codes.flatten().long()].view_as(exact)
    away = torch.linalg.vector_norm(exact - (seen if scales is None else seen * scales[:, None])).item()
    norm = torch.linalg.vector_norm(exact).item()
    return Encoded(codes, centroids, away / norm if norm else 0.0, scales)


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
