"""Claim: noise costs at most 5 % of a training step (exact pq 10 %, with its refreshes), and less than fairseq's.

    python benchmarks/noise.py [--layers 6 --dim 512 --words 10000 --tokens 2048 --p 0.1] [--json]

One step is forward, cross entropy, backward and Adam. The same network without noise, with each noise of ours and with
fairseq's own `--quant-noise-pq` is run in turn. fairseq's noise leaves out attention and embedding, ours hits all.
"""

import argparse
import time

import torch
from lm import OURS, STOCK, build, step
from side_by_side import Claim, at_most, parser, positive, report, rounds
from torch import nn

from fairseq_quant_noise.noise import noise_of

PLAIN, FAIRSEQ = "without noise", "fairseq's noise"


def refresh_seconds(model: nn.Module) -> float:
    """Seconds to find all codebooks anew from the last ones."""
    draw = noise_of(model)
    assert draw is not None
    start = time.perf_counter()
    for noise in draw.weights.values():
        for rule in noise.rules:
            rule.phi.fit(rule_blocks(model, noise.name, rule.rule.d))
    return time.perf_counter() - start


def rule_blocks(model: nn.Module, name: str, d: int) -> torch.Tensor:
    """The (n, d) blocks of the stored weight of a module."""
    return model.get_submodule(name)._parameters["weight"].detach().reshape(-1, d)  # type: ignore[union-attr]


def measure(args: argparse.Namespace) -> list[Claim]:
    """The claims."""
    sizes = {"layers": args.layers, "dim": args.dim, "words": args.words}
    kinds = {"proxy": "proxy", "int8": "int8", "pq": "exact pq"}
    models = {
        f"{title} noise": build(OURS, **sizes, quant_noise_pq=args.p, quant_noise_kind=kind, quant_noise_log_interval=0)
        for kind, title in kinds.items()
    }
    models[PLAIN] = build(STOCK, **sizes)
    models[FAIRSEQ] = build(STOCK, **sizes, quant_noise_pq=args.p, quant_noise_pq_block_size=8)
    seconds = rounds({name: step(model, args.tokens) for name, model in models.items()}, args.repeats)
    refresh = refresh_seconds(models["exact pq noise"]) / args.steps_per_epoch
    return [
        at_most("a step with proxy noise", seconds, "proxy noise", PLAIN, 1.05),
        at_most("a step with int8 noise", seconds, "int8 noise", PLAIN, 1.05),
        at_most("a step with exact pq noise, refreshes counted", seconds, "exact pq noise", PLAIN, 1.10, refresh),
        at_most("proxy noise against fairseq's own", seconds, "proxy noise", FAIRSEQ, 1.0),
        at_most("fairseq's own, for comparison", seconds, FAIRSEQ, PLAIN, 1.05),
    ]


def main() -> None:
    """Measure and print."""
    options = parser(__doc__, repeats=7)
    for name, default in (("layers", 6), ("dim", 512), ("words", 10_000), ("tokens", 2048)):
        options.add_argument(f"--{name}", type=positive, default=default)
    options.add_argument("--p", type=float, default=0.1, help="share of blocks hit (default 0.1)")
    options.add_argument(
        "--steps-per-epoch", type=positive, default=1000, help="steps between two refreshes of codebooks (default 1000)"
    )
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    report(measure(args), args.json)


if __name__ == "__main__":
    main()
