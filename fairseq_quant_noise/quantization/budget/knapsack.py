"""Choose one option for each weight: the least total loss within a budget of bytes (a multiple-choice knapsack).

    min sum_i loss_i(a_i)    subject to    sum_i bytes_i(a_i) <= budget

by dynamic programming over the bytes spent, in cells of budget / CELLS bytes. Bytes above a weight's smallest option
are rounded up to cells, so that a choice never exceeds the budget; it is the best one for a budget that is smaller by
at most a cell a weight.
"""

from collections.abc import Sequence

import torch

CELLS = 1 << 15
_Pair = tuple[int, float]  # bytes, loss


def choose(options: Sequence[Sequence[_Pair]], budget: int) -> list[int]:
    """The index of the option to take for each weight.

    Args:
        options: for each weight the (bytes, loss) of its options.
        budget: bytes for all weights; if even the smallest options exceed it, those are taken.
    """
    smallest = [min(size for size, _ in pairs) for pairs in options]
    spare = max(budget - sum(smallest), 0)
    cell = max(-(-spare // CELLS), 1)
    cells = spare // cell
    least = torch.zeros(cells + 1, dtype=torch.float64)  # (cells + 1,): of the weights so far, within so many cells
    taken = []
    for pairs, floor in zip(options, smallest, strict=True):
        losses = torch.full((len(pairs), cells + 1), torch.inf, dtype=torch.float64)
        for row, (size, loss) in zip(losses, pairs, strict=True):
            steps = -(-(size - floor) // cell)
            row[steps:] = least[: max(cells + 1 - steps, 0)] + loss
        least, best = losses.min(0)
        taken.append(best)
    choice, left = [], cells
    for pairs, floor, best in zip(reversed(options), reversed(smallest), reversed(taken), strict=True):
        choice.append(int(best[left]))
        left -= -(-(pairs[choice[-1]][0] - floor) // cell)
    return choice[::-1]
