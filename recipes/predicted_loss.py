"""Measure how well `plan --budget` predicts losses: Spearman's rank correlation of predicted and measured ones.

    python -m recipes.predicted_loss CKPT DATA

The losses are those of random plans on the first batches of DATA's training split. Two kinds of plans are drawn:

by size     a random size, and the best plan for it once every predicted loss is multiplied by e^x, x normal with
            standard deviation SPREAD: what a choice between sensible plans of all sizes is like
at random   each weight stored in one of the ways with equal probability: many weights are nearly lost, and what that
            costs together is not the sum of what each costs alone
"""

import argparse
import json
import math
import random
import sys
from collections.abc import Sequence

import torch

from fairseq_quant_noise.checkpoints.checkpoint import Checkpoint
from fairseq_quant_noise.cli.budget import Losses, Subject, planned_of
from fairseq_quant_noise.quantization.budget.knapsack import choose
from fairseq_quant_noise.quantization.budget.options import Priced
from fairseq_quant_noise.quantization.budget.pricing import price
from fairseq_quant_noise.quantization.budget.text import Chosen

SPREAD = 2.0


def by_size(priced: Sequence[Priced], draw: random.Random) -> list[int]:
    """The index of an option for each weight, near the best ones for a random size."""
    least = sum(min(option.bytes for option in one.options) for one in priced)
    most = sum(max(option.bytes for option in one.options[:-1]) for one in priced)
    size = int(math.exp(draw.uniform(math.log(1.5 * least), math.log(most))))
    noisy = [[(o.bytes, o.loss * math.exp(draw.gauss(0, SPREAD))) for o in one.options] for one in priced]
    return choose(noisy, size)


def at_random(priced: Sequence[Priced], draw: random.Random) -> list[int]:
    """The index of any option but dense, the last, for each weight."""
    return [draw.randrange(len(one.options) - 1) for one in priced]


KINDS = {"by size": by_size, "at random": at_random}


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """The correlation of the ranks of numbers without ties."""
    ranks = [torch.tensor(numbers, dtype=torch.float64).argsort().argsort().double() for numbers in (first, second)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def main(argv: Sequence[str] | None = None) -> None:
    """Print the rank correlation for each kind of plans."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("data")
    parser.add_argument("--plans", type=int, default=20, help="how many of each kind (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the plans (default 0)")
    parser.add_argument("--json", action="store_true", help="print JSON, with all losses")
    args = parser.parse_args(argv)

    from fairseq_quant_noise.plugin.calibration import loss_on

    checkpoint = Checkpoint(args.checkpoint)
    importance, subject = checkpoint.moments, Subject(checkpoint.network, checkpoint.config)
    priced = price(checkpoint.network, importance, _say)
    losses = Losses(checkpoint.network, importance, loss_on(checkpoint, args.data), lambda line: None)
    for kind, drawn_by in KINDS.items():
        draw, pairs = random.Random(args.seed), []
        for i in range(args.plans):
            picked = zip(priced, drawn_by(priced, draw), strict=True)
            plan = planned_of(subject, [Chosen(one.weight, one.options[index]) for one, index in picked])
            pairs.append((plan.predicted, losses(plan.plan)))
            _say(f"{kind}: {i + 1} of {args.plans}, predicted {pairs[-1][0]:.4g}, measured {pairs[-1][1]:.3f}")
        found = spearman(*zip(*pairs, strict=True))
        line = {"plans": kind, "spearman": found, "losses": pairs}
        print(json.dumps(line) if args.json else f"{kind}: {found:.3f} over {args.plans} plans", flush=True)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
