"""k-means over the blocks of a weight: the codebook of product quantization.

Minimizes over centroids c_1 .. c_K in R^d and codes I_1 .. I_n in {0 .. K - 1}

    SSE = sum_i || b_i - c_{I_i} ||^2

by Lloyd's two steps (IEEE Trans. Inf. Theory 28, 1982), the EM of "And the Bit Goes Down" (arXiv 1907.05686):
E: I_i = argmin_k || b_i - c_k ||^2,   M: c_k = mean of the b_i with I_i = k.

Shapes: n vectors (blocks) b_i of dimension d, K centroids, m vectors in the sample that seeds them.
The same code runs on a CPU and on a GPU. What is stored, when and for which weight is not decided here.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fairseq_quant_noise.errors import UserError

MAX_CENTROIDS = 256  # a code is one byte
SAMPLE = 1 << 14  # vectors that seed the centroids: 64 for each of 256
SLAB = 1 << 20  # vectors in float64 at a time: bounds the memory that exact sums need


@dataclass(frozen=True)
class Clustering:
    """What k-means found: ``centroids[codes.long()]`` approximates the vectors."""

    centroids: Tensor  # (K, d) float32
    codes: Tensor  # (n,) uint8, the argmin over the centroids
    sse: float  # sum_i || b_i - c_{I_i} ||^2, summed in float64


@dataclass(frozen=True)
class _Frame:
    """Coordinates in which || c ||^2 - 2 b.c keeps its digits in float32: the common offset removed, squares in range."""

    offset: Tensor  # (1, d) float64
    scale: float  # a power of two, so that scaling rounds nothing

    def __call__(self, vectors: Tensor) -> Tensor:
        return (vectors.double() - self.offset) * self.scale  # (n, d) float64


def effective_centroids(n_vectors: int, n_centroids: int) -> int:
    """The number of centroids K that ``n_vectors`` blocks can feed.

    ``n_centroids`` where it is at most ``n_vectors // 4``; else the largest power of two that is at most a quarter of
    ``n_vectors``, and at least 1 (arXiv 1907.05686, section 4.1: K is clamped so that a centroid has four blocks).
    """
    quarter = max(n_vectors // 4, 1)
    return n_centroids if n_centroids <= quarter else 1 << (quarter.bit_length() - 1)


def kmeans(vectors: Tensor, n_centroids: int, *, iterations: int = 20, seed: int = 0) -> Clustering:
    """Cluster ``vectors`` (n, d), of any float dtype and device, around K = ``n_centroids`` centroids, 1 to 256.

    Lloyd's EM over every vector (module docstring) from k-means++ seeds, for at most ``iterations`` full steps;
    it stops early once no code changes. With at most K distinct vectors the result is exact, and spare centroids repeat
    the last one. The same input and seed give the same bits; the global random state is neither read nor written.

    Raises UserError when K is not in 1 .. 256, or the vectors are none, not (n, d), or hold NaN or inf.
    """
    _check(vectors, n_centroids)
    vectors = vectors.detach().float() + 0.0  # (n, d); + 0.0 turns -0.0 into 0.0, for they are one vector
    generator = torch.Generator().manual_seed(seed)
    rows = (
        torch.randint(len(vectors), (SAMPLE,), generator=generator) if len(vectors) > SAMPLE else slice(None)
    )
    sample = vectors[rows]  # (m, d)

    centroids = _distinct(sample, vectors, n_centroids)  # (K, d) or None
    # The median, unlike the mean, stays with the crowd when one vector is enormous.
    offset = sample.double().cpu().median(0, keepdim=True).values.to(vectors.device)  # (1, d)
    # Largest value 2^56: d squares of it fit float32, and so do squares 2^-119 times as large.
    largest = vectors.abs().max().item() + offset.abs().max().item()
    frame = _Frame(offset, 2.0 ** (56 - math.frexp(largest)[1]))
    if centroids is None:
        seeds = _plus_plus(frame(sample).cpu(), n_centroids, generator)  # (K,) rows of the sample
        centroids = sample[seeds.to(sample.device)].double()  # (K, d)
        centroids = _lloyd(sample, frame, centroids, iterations // 2)  # a warm start at a tenth of the cost
        centroids = _lloyd(vectors, frame, centroids, iterations)

    centroids = centroids.float()  # (K, d)
    target = frame(centroids)  # (K, d) float64: the codes fit the centroids as returned, after rounding
    codes = torch.cat([_assign(frame(part), target) for part in vectors.split(SLAB)])  # (n,)
    parts = zip(vectors.split(SLAB), codes.split(SLAB), strict=True)
    sse = sum(float((part.double() - centroids[code]).square().sum()) for part, code in parts)
    return Clustering(centroids, codes.to(torch.uint8), sse)


def _check(vectors: Tensor, n_centroids: int) -> None:
    """Refuse what has no clustering."""
    if not 1 <= n_centroids <= MAX_CENTROIDS:
        raise UserError(f"n_centroids is {n_centroids}: a code is one byte, choose 1 to {MAX_CENTROIDS}")
    if vectors.dim() != 2 or vectors.numel() == 0:
        raise UserError(
            f"vectors of shape {tuple(vectors.shape)} cannot be clustered: give (n, d) with n, d >= 1"
        )
    if not torch.isfinite(vectors.float()).all():
        raise UserError("the vectors hold NaN/inf (in float32): repair the weight before quantizing it")


def _distinct(sample: Tensor, vectors: Tensor, n_centroids: int) -> Tensor | None:
    """The distinct vectors, padded to (K, d), or None where they are more than K. Most data is told from the sample."""
    if len(sample.unique(dim=0)) > n_centroids:
        return None
    values = vectors.unique(dim=0)  # (distinct, d)
    spare = n_centroids - len(values)
    return None if spare < 0 else torch.cat([values, values[-1:].expand(spare, -1)])  # (K, d)


def _plus_plus(sample: Tensor, n_centroids: int, generator: torch.Generator) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii 2007) in (m, d): each seed is drawn in proportion to its squared error.

    Runs on the CPU: K dependent draws are latency rather than work, and a GPU's float cumsum is not deterministic.
    """
    columns = sample.t().contiguous()  # (d, m)
    error = torch.full((len(sample),), 1.0, dtype=torch.float64)  # (m,): the first draw is uniform
    draws = torch.rand(n_centroids, generator=generator, dtype=torch.float64)  # (K,)
    seeds = torch.empty(n_centroids, dtype=torch.long)  # (K,)
    for k in range(n_centroids):
        mass = error.cumsum(0)  # (m,)
        seeds[k] = torch.searchsorted(mass, draws[k] * mass[-1], right=True).clamp_(max=len(sample) - 1)
        distance = (columns - columns[:, seeds[k], None]).square_().sum(0)  # (m,)
        error = torch.minimum(error, distance) if k else distance  # (m,)
    return seeds


def _lloyd(vectors: Tensor, frame: _Frame, centroids: Tensor, iterations: int) -> Tensor:
    """At most ``iterations`` E and M steps over (n, d) from (K, d) float64; fewer once no code changes."""
    points = torch.cat([frame(part).float() for part in vectors.split(SLAB)])  # (n, d)
    previous = torch.empty(0)
    for _ in range(iterations):
        codes = _assign(points, frame(centroids).float())  # (n,)
        if torch.equal(codes, previous):
            break
        centroids, previous = _means(vectors, codes, centroids), codes  # (K, d), (n,)
    return centroids


def _assign(points: Tensor, centroids: Tensor) -> Tensor:
    """E-step: (n,) int64 argmin_k ||c_k||^2 - 2 b.c_k, the first where several are least."""
    n, k = len(points), len(centroids)
    rows = (1 << 20 if points.device.type == "cpu" else 1 << 26) // k  # the scores stay in a CPU's cache
    bias, slope = centroids.square().sum(1), centroids.t() * -2  # (K,), (d, K)
    # amin and eq are vectorized on a CPU where argmin is not: marking the least and reading its rank is twice as fast.
    rank = torch.arange(k, 0, -1, device=points.device, dtype=points.dtype)  # (K,)
    buffer = points.new_empty(min(rows, n), k)  # (rows, K)
    best = points.new_empty(n)  # (n,)
    for chunk, out in zip(points.split(rows), best.split(rows), strict=True):
        score = torch.addmm(bias, chunk, slope, out=buffer[: len(chunk)])  # (rows, K)
        torch.amax(score.eq_(score.amin(1, keepdim=True)).mul_(rank), 1, out=out)  # (rows,)
    return k - best.long()


def _means(vectors: Tensor, codes: Tensor, centroids: Tensor) -> Tensor:
    """M-step: (K, d) float64 means; an empty cluster moves onto one of the vectors with the largest error."""
    total = torch.zeros_like(centroids)  # (K, d)
    for part, code in zip(vectors.split(SLAB), codes.split(SLAB), strict=True):
        # In float64 index_put_ adds in a fixed order on a CPU and on a GPU; index_add_ does not.
        total.index_put_((code,), part.double(), accumulate=True)
    count = codes.bincount(minlength=len(centroids))[:, None]  # (K, 1)
    means = torch.where(count > 0, total / count.clamp(min=1), centroids)  # (K, d)
    empty = (count[:, 0] == 0).nonzero()[:, 0]  # (empty,)
    if len(empty):
        error = (vectors - means[codes]).square().sum(1)  # (n,)
        error, order = error.sort(descending=True, stable=True)  # (n,), (n,)
        far = vectors[order]  # (n, d)
        fresh = (far != far.roll(1, 0)).any(
            1
        )  # (n,): copies of one vector are neighbours here; one is enough
        chosen = far[fresh & (error > 0)][: len(empty)]  # (moved, d): none when every vector is exact
        means[empty[: len(chosen)]] = chosen.double()
    return means
