"""One claim: k-means encodes a weight in seconds or less, at an error no higher than fairseq's own EM.

Both cluster the same matrix, in one process, on the same threads, for the same number of iterations:

    python benchmarks/encode.py                            # 256 x 256, the peer ends in a minute
    python benchmarks/encode.py --rows 768 --columns 768   # the peer takes minutes

fairseq's EM runs once (it is slow, and does not get faster when warm); ours is the median of ``--repeats``.
"""

import argparse
import json
import platform
import random
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from fairseq_quant_noise.pq.kmeans import kmeans


def arguments() -> argparse.Namespace:
    """The command line; sizes are in weights, and a block is ``--block-size`` neighbours of one row."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--columns", type=int, default=256)
    parser.add_argument("--block-size", type=int, default=4, help="d, which divides the columns")
    parser.add_argument("--centroids", type=int, default=256, help="K")
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=5, help="runs of ours, of which the median counts")
    parser.add_argument("--no-peer", action="store_true", help="time ours alone")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    args = parser.parse_args()
    if args.columns % args.block_size:
        parser.error(f"--block-size {args.block_size} must divide --columns {args.columns}: change one")
    return args


def processor() -> str:
    """The processor's name, from Linux where ``platform`` has none."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def time_ours(vectors: Tensor, args: argparse.Namespace) -> tuple[float, float]:
    """Median seconds and SSE of ours on (n, d), after one run to warm up."""
    kmeans(vectors, args.centroids, iterations=1)
    seconds = []
    for _ in range(args.repeats):
        start = time.perf_counter()
        found = kmeans(vectors, args.centroids, iterations=args.iterations, seed=args.seed)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), found.sse


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


def time_fairseq(vectors: Tensor, args: argparse.Namespace) -> tuple[float, float]:
    """Seconds and SSE of one run of fairseq's EM on (n, d), after a small one to warm up."""
    run_em(vectors[:512], 8, 2)
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    start = time.perf_counter()
    sse = run_em(vectors, args.centroids, args.iterations)
    return time.perf_counter() - start, sse


def main() -> None:
    """Time both, print one table or one JSON object."""
    args = arguments()
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(args.seed)
    weight = torch.randn(args.rows, args.columns, generator=generator) * args.columns**-0.5
    vectors = weight.reshape(-1, args.block_size)  # (n, d)
    measured = {"ours": time_ours(vectors, args)}
    if not args.no_peer:
        measured["fairseq"] = time_fairseq(vectors, args)
    report = {
        "machine": processor(),
        "threads": args.threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "matrix": f"{args.rows} x {args.columns}, d = {args.block_size}, K = {args.centroids}",
        "iterations": args.iterations,
    }
    for name, (seconds, sse) in measured.items():
        report |= {f"{name}_seconds": seconds, f"{name}_sse": sse}
    if "fairseq" in measured:
        report["times_faster"] = measured["fairseq"][0] / measured["ours"][0]
        report["error_ratio"] = measured["ours"][1] / measured["fairseq"][1]
    if args.json:
        print(json.dumps(report))
        return
    for key, value in report.items():
        print(f"{key.replace('_', ' '):16} {value:.4g}" if isinstance(value, float) else f"{key:16} {value}")


if __name__ == "__main__":
    main()
