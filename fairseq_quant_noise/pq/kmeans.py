"""k-means over the blocks of a weight: the codebook of product quantization.

Minimizes, over centroids c_1 .. c_K in R^d and codes I_1 .. I_n in {0 .. K - 1},

    SSE = sum_i || b_i - c_{I_i} ||^2

by Lloyd's two steps (IEEE Trans. Inf. Theory 28, 1982), the EM of "And the Bit Goes Down" (arXiv 1907.05686):
E: I_i = argmin_k || b_i - c_k ||^2,   M: c_k = mean of the b_i with I_i = k.
With weights h_ij > 0 of the numbers, || b - c ||^2 is sum_j h_ij (b_j - c_j)^2 throughout, and the mean a weighted one.
Shapes: n vectors (blocks) b_i of dimension d, K centroids, m vectors in the sample that seeds them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from ..kernels import nearest
from ..utils.bits import MOST_CENTROIDS, code_dtype

SAMPLE = 1 << 14  # vectors that seed the centroids: 64 for each of 256
MIDDLE = 1 << 16  # vectors that bring them near where all would
Frame = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Clustering:
    """What k-means found: ``centroids[codes.long()]`` approximates the vectors."""

    centroids: Tensor  # (K, d) float32
    codes: Tensor  # (n,) uint8, or int32 where K is above 256: the argmin over the centroids
    sse: float  # sum_i || b_i - c_{I_i} ||^2, by the weights, summed in float64


@dataclass(frozen=True)
class _Points:
    """Vectors (n, d) float32 and, if any, weights of their numbers (n, d) float32."""

    vectors: Tensor
    weights: Tensor | None

    def __getitem__(self, rows: Tensor | slice) -> "_Points":
        return _Points(self.vectors[rows], None if self.weights is None else self.weights[rows])

    def __len__(self) -> int:
        return len(self.vectors)

    def errors(self, differences: Tensor) -> Tensor:
        """|| differences ||^2, by the weights: (n, d) -> (n,), of their dtype."""
        squares = differences.square()
        return (squares if self.weights is None else squares.mul_(self.weights)).sum(1)


def effective_centroids(n_vectors: int, n_centroids: int) -> int:
    """The number K of centroids that ``n_vectors`` blocks can feed (the clamp of arXiv 1907.05686, in its code).

    ``n_centroids`` where it is at most ``n_vectors // 4``, else the largest power of two that is; at least 1.
    """
    quarter = max(n_vectors // 4, 1)
    return n_centroids if n_centroids <= quarter else 1 << (quarter.bit_length() - 1)


def kmeans(
    vectors: Tensor,
    n_centroids: int,
    *,
    iterations: int = 20,
    seed: int = 0,
    start: Tensor | None = None,
    weights: Tensor | None = None,
) -> Clustering:
    """Cluster the vectors around K centroids (see the module's docstring).

    It takes ``iterations`` EM steps over a sample from k-means++ seeds, then as many over every vector, fewer once no
    code changes. Of more than 2^17 vectors it takes half as many over 2^16, then a third over every vector, which ends
    within .5 % of the error in less than half the time. At most K distinct vectors are returned exactly, the last one
    repeated up to K. The same input and seed give the same bits; the global random state is left alone.

    Args:
        vectors: (n, d), of any dtype and device.
        n_centroids: K.
        iterations: EM steps, at most, over the sample and again over every vector.
        seed: of the sample and the k-means++ seeds.
        start: (K, d), centroids to start from, at once over every vector.
        weights: (n, d), positive, of the numbers' squared errors; without, all count alike.

    Returns:
        Centroids (K, d), codes (n,) and their squared error.

    Raises:
        UserError: K is not in 1 .. 4096; `vectors` is empty, not of two dimensions, or holds NaN or infinity.
    """
    points = _Points(_checked(vectors, n_centroids), None if weights is None else weights.float())
    device = points.vectors.device
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(points), generator=generator)[:MIDDLE].to(device)
    sample = points[order[:SAMPLE]]  # m of them
    frame = _frame(sample.vectors, points.vectors)
    few = sample.vectors[: 16 * n_centroids]  # enough to show that more than K are distinct, where so many are
    centroids = _distinct(few, points.vectors, n_centroids)  # (K, d) or None
    if centroids is None and start is not None:
        centroids = _lloyd(points, frame, start.to(device).double(), iterations).float()  # (K, d)
    elif centroids is None:
        restarts = range(max(1, min(16, 256 // n_centroids)))  # few centroids end in worse minima, and cost less
        seeds = [_plus_plus(sample, frame, n_centroids, generator) for _ in restarts]  # (K, d) each
        starts = [_lloyd(sample, frame, start, iterations) for start in seeds]  # (K, d) each
        best = min(starts, key=lambda start: _encode(sample, frame, start)[1])  # (K, d)
        if len(points) > 2 * MIDDLE:
            best, iterations = _lloyd(points[order], frame, best, -(-iterations // 2)), -(-iterations // 3)
        centroids = _lloyd(points, frame, best, iterations).float()  # (K, d)
    codes, sse = _encode(points, frame, centroids)
    return Clustering(centroids, codes.to(code_dtype(n_centroids)), sse)


def _checked(vectors: Tensor, n_centroids: int) -> Tensor:
    if not 1 <= n_centroids <= MOST_CENTROIDS:
        raise UserError(f"n_centroids is {n_centroids}, but a code has 12 bits at most: choose 1 to {MOST_CENTROIDS}")
    if vectors.dim() != 2 or vectors.numel() == 0:
        raise UserError(f"no vectors to cluster in a tensor of shape {tuple(vectors.shape)}: give (n, d)")
    vectors = vectors.detach().float() + 0.0  # (n, d); + 0.0 makes -0.0 and 0.0 one vector
    if not vectors.isfinite().all():
        raise UserError("the vectors hold NaN/inf (as float32): repair the weight before quantizing it")
    return vectors


def _frame(sample: Tensor, vectors: Tensor) -> Frame:
    """Float64 coordinates in which || c ||^2 - 2 b.c keeps its digits: no common offset, squares in range."""
    offset = sample.double().cpu().median(0).values.to(vectors.device)  # (d,); an outlier does not move it
    largest = vectors.abs().max().double() + offset.abs().max()  # ()
    scale = 2.0 ** (56 - int(largest.frexp().exponent))  # exact; d squares of at most 2^56 fit float32
    return lambda any_vectors: (any_vectors.double() - offset) * scale  # (..., d)


def _distinct(sample: Tensor, vectors: Tensor, n_centroids: int) -> Tensor | None:
    """The distinct vectors padded to (K, d), or None if they are more than K, as the sample may show at once."""
    if len(sample.unique(dim=0)) > n_centroids or len(values := vectors.unique(dim=0)) > n_centroids:
        return None
    return torch.cat([values, values[-1:].expand(n_centroids - len(values), -1)])


def _plus_plus(sample: _Points, frame: Frame, n_centroids: int, generator: torch.Generator) -> Tensor:
    """Greedy k-means++ (Arthur, Vassilvitskii 2007): (K, d) of the (m, d), each the best of 4 draws by error."""
    # On the CPU always: K dependent draws are latency, not work, and a GPU's cumsum is not deterministic.
    columns = frame(sample.vectors).float().cpu().t()[:, None].contiguous()  # (d, 1, m)
    weights = None if sample.weights is None else sample.weights.cpu().t()[:, None].contiguous()  # (d, 1, m)

    def errors(chosen: Tensor) -> Tensor:
        """Squared distances of all vectors to each of the `chosen` (c,): (c, m)."""
        squares = (columns - columns[:, 0, chosen, None]).square_()  # (d, c, m)
        return (squares if weights is None else squares.mul_(weights)).sum(0)

    draws = torch.rand(n_centroids, 4, generator=generator, dtype=torch.float64)  # (K, 4)
    seeds = (draws[:, 0] * len(sample)).long()  # (K,): the first is uniform, the others follow
    error = errors(seeds[:1])[0]  # (m,)
    for k in range(1, n_centroids):
        mass = error.double().cumsum(0)  # (m,): all zero if no k rows are distinct, hence the clamp
        drawn = torch.searchsorted(mass, draws[k] * mass[-1], right=True).clamp_(max=len(mass) - 1)  # (4,)
        candidates = torch.minimum(errors(drawn), error)  # (4, m)
        best = candidates.sum(1, dtype=torch.float64).argmin()
        seeds[k], error = drawn[best], candidates[best]
    return sample.vectors[seeds.to(sample.vectors.device)].double()


def _encode(points: _Points, frame: Frame, centroids: Tensor) -> tuple[Tensor, float]:
    """Codes (n,) and SSE of (n, d) with (K, d), in float64 throughout: centroids count as they were rounded."""
    weights = None if points.weights is None else points.weights.double()
    codes = nearest(frame(points.vectors), frame(centroids), weights)  # (n,)
    return codes, points.errors(points.vectors.double() - centroids[codes]).sum().item()


def _lloyd(points: _Points, frame: Frame, centroids: Tensor, iterations: int) -> Tensor:
    """At most ``iterations`` EM steps over (n, d) from centroids (K, d) float64; ends once no code changes."""
    framed, exact, before = frame(points.vectors).float(), points.vectors.double(), None  # (n, d), (n, d), (n,)
    for _ in range(iterations):
        codes = nearest(framed, frame(centroids).float(), points.weights)  # (n,)
        if before is not None and torch.equal(codes, before):
            break
        centroids, before = _means(points, exact, codes, centroids), codes  # (K, d), (n,)
    return centroids


def _means(points: _Points, exact: Tensor, codes: Tensor, centroids: Tensor) -> Tensor:
    """M-step: (K, d) float64 means; an empty cluster moves onto one of the vectors with the largest error."""
    total = torch.zeros_like(centroids)  # (K, d); index_put_ sums in a fixed order, index_add_ not on a GPU
    count = codes.bincount(minlength=len(centroids))  # (K,)
    if points.weights is None:
        total.index_put_((codes,), exact, accumulate=True)
        means = total / count.clamp(min=1)[:, None]  # (K, d)
    else:
        mass = torch.zeros_like(centroids).index_put_((codes,), points.weights.double(), accumulate=True)  # (K, d)
        total.index_put_((codes,), points.weights * exact, accumulate=True)
        means = total / torch.where(mass > 0, mass, 1.0)  # (K, d)
    empty = (count == 0).nonzero()[:, 0]  # (empty,)
    if len(empty):
        error = points.errors(exact - means[codes])  # (n,)
        order = error.argsort(descending=True, stable=True)[: (error > 0).sum()]  # none when all are exact
        far = points.vectors[order].unique_consecutive(dim=0)[: len(empty)]  # (moved, d): copies stand side by side
        means[empty] = torch.cat([far.double(), centroids[empty[len(far) :]]])
    return means
