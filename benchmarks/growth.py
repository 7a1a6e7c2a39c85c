"""How cost grows, beside the floor: encoding with the numbers of a weight, K and d; noise with the tokens of a step.

    python benchmarks/growth.py [--largest 4718592] [--tokens 512 1024 2048 4096] [--json]

The floor of an encoding is the multiply-adds of 20 plain passes of k-means, n K d each for n blocks, at the rate of a
matrix product on this machine (ours makes fewer passes over all blocks where there are many); that of noise is its
bytes, every weight read and written once, at the rate of a copy.
"""

import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
from lm import OURS, STOCK, build, step
from side_by_side import machine, parser, positive, rounds

from fairseq_quant_noise.pq.kmeans import kmeans

BASE = {"numbers": 1_179_648, "d": 8, "k": 256}  # half a feed-forward weight of RoBERTa-base
VARIED = {"numbers": [294_912, 589_824, 1_179_648, 2_359_296, 4_718_592], "d": [4, 8, 16], "k": [16, 64, 256]}
ITERATIONS = 20


def median_seconds(run: Callable[[], object], repeats: int) -> float:
    """Of `repeats` runs, after one to warm up."""
    return statistics.median(rounds({"run": run}, repeats, 1)["run"])


def rates() -> tuple[float, float]:
    """Multiply-adds and copied bytes (read and written) a second."""
    a, source = torch.randn(1024, 1024), torch.randn(1 << 24)
    target = torch.empty_like(source)
    products = 1024**3 / median_seconds(lambda: a @ a, 5)
    return products, 2 * source.nbytes / median_seconds(lambda: target.copy_(source), 5)


def encode_row(numbers: int, d: int, k: int, products: float, repeats: int) -> dict[str, Any]:
    """Seconds of k-means on a weight of so many numbers, and the floor."""
    blocks = torch.randn(numbers // d, d, generator=torch.Generator().manual_seed(0))
    seconds = median_seconds(lambda: kmeans(blocks, k, iterations=ITERATIONS), repeats)
    floor = ITERATIONS * numbers * k / products
    return {"what": "encode", "numbers": numbers, "d": d, "k": k, "seconds": seconds, "floor": floor}


def noise_row(tokens: int, bytes_a_second: float, repeats: int) -> dict[str, Any]:
    """Seconds that proxy noise adds to a step of so many tokens, and the floor; 6 layers, d 512."""
    sizes = {"layers": 6, "dim": 512, "words": 10_000}
    noised, plain = build(OURS, **sizes, quant_noise_pq=0.1, quant_noise_log_interval=0), build(STOCK, **sizes)
    seconds = rounds({"noised": step(noised, tokens), "plain": step(plain, tokens)}, repeats)
    both = {name: statistics.median(of) for name, of in seconds.items()}
    weights = sum(p.nbytes for p in plain.parameters() if p.dim() > 1)
    row = {"what": "noise", "tokens": tokens, "step": both["plain"], "ratio": both["noised"] / both["plain"]}
    return row | {"seconds": both["noised"] - both["plain"], "floor": 2 * weights / bytes_a_second}


def table(rows: list[dict[str, Any]]) -> None:
    """Print the rows."""
    print(machine())
    print("| k-means, 20 iterations: numbers | d | K | seconds | floor | times |\n|---|---|---|---|---|---|")
    for r in (r for r in rows if r["what"] == "encode"):
        times = r["seconds"] / r["floor"]
        print(f"| {r['numbers']:,} | {r['d']} | {r['k']} | {r['seconds']:.3f} | {r['floor']:.3f} | {times:.1f} |")
    print("\n| tokens a step | a step, s | with noise | noise, s | floor |\n|---|---|---|---|---|")
    for r in (r for r in rows if r["what"] == "noise"):
        print(f"| {r['tokens']} | {r['step']:.3f} | x{r['ratio']:.3f} | {r['seconds']:.3f} | {r['floor']:.3f} |")


def main() -> None:
    """Measure and print."""
    options = parser(__doc__, repeats=5)
    options.add_argument(
        "--largest", type=positive, default=VARIED["numbers"][-1], help="numbers of the largest weight"
    )
    options.add_argument("--tokens", type=positive, nargs="*", default=[512, 1024, 2048, 4096])
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    products, copied = rates()
    cases = [BASE | {name: value} for name, values in VARIED.items() for value in values]
    cases = [case for i, case in enumerate(cases) if case not in cases[:i] and case["numbers"] <= args.largest]
    rows = [encode_row(**case, products=products, repeats=args.repeats) for case in cases]
    rows += [noise_row(tokens, copied, args.repeats) for tokens in args.tokens]
    print(json.dumps(rows)) if args.json else table(rows)


if __name__ == "__main__":
    main()
