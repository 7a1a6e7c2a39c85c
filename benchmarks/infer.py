"""Claim: a quantized layer is faster than the dense one at batch 1, and far faster than fairseq's PQLinear.

    python benchmarks/infer.py [--batches 1 64 512] [--shapes 4096x1024x8 1024x4096x8 1024x1024x4] [--json]

Layers of rows x row length x d, K = 256, fp32, without gradients. Dense, ours and
fairseq's run in turn; a run is as many calls as take some milliseconds. Ours keeps no dense copy of the
weight, but for those of at most 2^18 numbers, in float16, from 2 to 12 rows with AVX-512.
"""

import argparse
from collections.abc import Callable

import torch
from fairseq.modules.quantization.pq.modules import PQLinear
from side_by_side import Claim, at_least, parser, positive, report, rounds
from torch import nn

from fairseq_quant_noise.layers import quantize_weight_
from fairseq_quant_noise.weights.discovery import find_weights

K = 256
SHAPES = [(4096, 1024, 8), (1024, 4096, 8), (1024, 1024, 4)]
#: Times faster than dense by batch; of the smaller layer at batch 1.
DENSE, SMALL, FAIRSEQ = {1: 2.5, 64: 0.8, 512: 0.95}, 1.3, 10.0


def calls(module: nn.Module, x: torch.Tensor, n: int) -> Callable[[], None]:
    """`n` calls of the module."""

    def run() -> None:
        with torch.no_grad():
            for _ in range(n):
                module(x)

    return run


def contenders(out: int, inner: int, d: int, batch: int) -> dict[str, Callable[[], None]]:
    """The layer in three forms, with the same codes."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(K, (out, inner // d), generator=generator)
    centroids = torch.randn(K, d, generator=generator)
    dense, ours = nn.Linear(inner, out).eval(), nn.Linear(inner, out).eval()
    (weight,) = find_weights(ours)
    quantize_weight_(weight, codes.to(torch.uint8), centroids)
    theirs = PQLinear(centroids, codes.t().flatten(), dense.bias.detach(), inner, out).eval()
    x = torch.randn(batch, inner, generator=generator)
    n = max(1, 64 // batch)
    modules = {"dense": dense, "ours": ours, "fairseq's PQLinear": theirs}
    return {name: calls(module, x, n) for name, module in modules.items()}


def shape(text: str) -> tuple[int, int, int]:
    """ROWSxLENGTHxD."""
    numbers = [positive(number) for number in text.split("x")]
    if len(numbers) != 3 or numbers[1] % numbers[2]:
        raise argparse.ArgumentTypeError(
            f"{text!r}: give ROWSxLENGTHxD, such as 1024x1024x4, with D a divisor of LENGTH"
        )
    return numbers[0], numbers[1], numbers[2]


def measure(batches: list[int], shapes: list[tuple[int, int, int]], repeats: int) -> list[Claim]:
    """The claims."""
    claims = []
    for batch in batches:
        for out, inner, d in shapes:
            seconds = rounds(contenders(out, inner, d, batch), repeats)
            name = f"batch {batch}, {out} x {inner}, d {d}"
            bound = SMALL if batch == 1 and d == 4 else DENSE.get(batch, 0.8)
            claims.append(at_least(f"{name}: against dense", seconds, "ours", "dense", bound))
            bound = FAIRSEQ if batch == 1 and d == 8 else 1.0
            claims.append(at_least(f"{name}: against fairseq's", seconds, "ours", "fairseq's PQLinear", bound))
    return claims


def main() -> None:
    """Measure and print."""
    options = parser(__doc__, repeats=15)
    options.add_argument("--batches", type=positive, nargs="+", default=[1, 64, 512])
    options.add_argument("--shapes", type=shape, nargs="+", default=SHAPES, metavar="ROWSxLENGTHxD")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    report(measure(args.batches, args.shapes, args.repeats), args.json)


if __name__ == "__main__":
    main()
