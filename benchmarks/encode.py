"""Claim: k-means encodes a weight hundreds of times faster than fairseq's EM, and as faiss, at no higher error.

    python benchmarks/encode.py                            # 768 x 768, d 4: fairseq's EM takes minutes
    python benchmarks/encode.py --rows 256 --columns 256   # a minute
    python benchmarks/encode.py --rows 3072 --columns 768 --block-size 8 --peers faiss    # pip install faiss-cpu

All cluster the same matrix of normal random numbers around 256 centroids for 20 iterations, on the same threads; faiss
over all points, not its usual sample. fairseq's EM runs once (it is slow, and gets no faster when warm).
"""

import argparse
import importlib.util
import random
import statistics
import time
from collections.abc import Callable

import torch
from side_by_side import Claim, at_least, at_most, parser, positive, report, rounds
from torch import Tensor

from fairseq_quant_noise.pq.kmeans import kmeans

FAISS, FAIRSEQ = "faiss", "fairseq"


def arguments() -> argparse.Namespace:
    """The command line; sizes are in weights, and a block is `--block-size` neighbours of one row."""
    options = parser(__doc__, repeats=5)
    options.add_argument("--rows", type=positive, default=768)
    options.add_argument("--columns", type=positive, default=768)
    options.add_argument("--block-size", type=positive, default=4, help="d, which divides the columns")
    options.add_argument("--centroids", type=positive, default=256, help="K")
    options.add_argument("--iterations", type=positive, default=20)
    options.add_argument("--peers", nargs="*", choices=(FAIRSEQ, FAISS), default=[FAIRSEQ], help="to measure against")
    args = options.parse_args()
    if args.columns % args.block_size:
        options.error(f"--block-size {args.block_size} must divide --columns {args.columns}: change one")
    if FAISS in args.peers and importlib.util.find_spec("faiss") is None:
        options.error("--peers faiss: faiss is not installed; run: pip install faiss-cpu")
    return args


def run_em(vectors: Tensor, n_centroids: int, iterations: int) -> float:
    """SSE of fairseq's EM on (n, d), in float64 as ours is; NaN where it gives up on empty clusters."""
    from fairseq.modules.quantization.pq.em import EM, EmptyClusterResolveError

    em = EM(vectors.t().contiguous(), n_centroids=n_centroids, n_iter=iterations, verbose=False)
    em.initialize_centroids()
    try:
        for i in range(iterations):
            em.step(i)
    except EmptyClusterResolveError:
        return float("nan")
    em.assign()
    return (vectors.double() - em.centroids[em.assignments].double()).square().sum().item()


def sse_of(found: Tensor, vectors: Tensor) -> float:
    """The squared error of the best codes for these centroids, in float64."""
    return sum(
        float(torch.cdist(part.double(), found.double()).min(1).values.square().sum())
        for part in vectors.split(1 << 14)
    )


def by_faiss(vectors: Tensor, args: argparse.Namespace) -> Tensor:
    """faiss's centroids (K, d)."""
    import faiss

    faiss.omp_set_num_threads(args.threads)
    n, d = vectors.shape
    settings = {"niter": args.iterations, "max_points_per_centroid": n, "seed": 1}
    clustering = faiss.Kmeans(d, args.centroids, **settings)
    clustering.train(vectors.numpy())
    return torch.from_numpy(clustering.centroids)


def against_faiss(vectors: Tensor, args: argparse.Namespace) -> list[Claim]:
    """Time and error beside faiss's."""
    contenders: dict[str, Callable[[], object]] = {
        "ours": lambda: kmeans(vectors, args.centroids, iterations=args.iterations),
        FAISS: lambda: by_faiss(vectors, args),
    }
    seconds = rounds(contenders, args.repeats, warm_up=1)
    ours = sse_of(kmeans(vectors, args.centroids, iterations=args.iterations).centroids, vectors)
    errors = {"ours": [ours], FAISS: [sse_of(by_faiss(vectors, args), vectors)]}
    return [
        at_most("k-means, time", seconds, "ours", FAISS, 1.0),
        at_most("k-means, squared error", errors, "ours", FAISS, 1.001, unit=""),
    ]


def against_fairseq(vectors: Tensor, args: argparse.Namespace) -> list[Claim]:
    """Time and error beside those of fairseq's EM."""
    run_em(vectors[:512], 8, 2)
    torch.manual_seed(1)
    random.seed(1)
    start = time.perf_counter()
    error = run_em(vectors, args.centroids, args.iterations)
    theirs = time.perf_counter() - start
    mine = rounds({"ours": lambda: kmeans(vectors, args.centroids, iterations=args.iterations)}, args.repeats, 1)[
        "ours"
    ]
    seconds = {"ours": [statistics.median(mine)], "fairseq's EM": [theirs]}
    errors = {"ours": [kmeans(vectors, args.centroids, iterations=args.iterations).sse], "fairseq's EM": [error]}
    return [
        at_least("k-means, times faster", seconds, "ours", "fairseq's EM", 300),
        at_most("k-means, squared error", errors, "ours", "fairseq's EM", 1.0, unit=""),
    ]


def main() -> None:
    """Measure and print."""
    args = arguments()
    torch.set_num_threads(args.threads)
    weight = torch.randn(args.rows, args.columns, generator=torch.Generator().manual_seed(0)) * args.columns**-0.5
    vectors = weight.reshape(-1, args.block_size)  # (n, d)
    claims = against_faiss(vectors, args) if FAISS in args.peers else []
    claims += against_fairseq(vectors, args) if FAIRSEQ in args.peers else []
    report(claims, args.json)


if __name__ == "__main__":
    main()
