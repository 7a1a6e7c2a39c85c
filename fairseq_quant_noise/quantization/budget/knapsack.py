"""Choose one option for each weight: the least total loss within a budget of bytes (a multiple-choice knapsack).

    min sum_i loss_i(a_i)    subject to    sum_i bytes_i(a_i) + sum_g fixed_g(c_g) <= budget

Weights come in groups g. A group has alternatives c_g, such as the codebook that its weights may share: each costs
fixed bytes once, and says which options a_i the group's weights have. The best choice is found by dynamic programming
over the bytes spent, in cells of budget / CELLS bytes. Bytes above the smallest of each group and weight are rounded up
to cells, so that a choice never exceeds the budget; it is the best one for a budget that is smaller by at most a cell
a weight and a group. Alternatives are chosen in larger cells, budget / FEW_CELLS, for each has to be tried in full.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

CELLS, FEW_CELLS = 1 << 15, 1 << 11
_Pair = tuple[int, float]  # bytes, loss


class Alternative(NamedTuple):
    """What the weights of a group may choose from."""

    fixed: int  # bytes, spent once
    options: Sequence[Sequence[_Pair]]  # for each weight of the group the (bytes, loss) of its options

    @property
    def least_bytes(self) -> int:
        """With the smallest option of each weight."""
        return self.fixed + sum(_smallest(pairs) for pairs in self.options)


def choose(options: Sequence[Sequence[_Pair]], budget: int) -> list[int]:
    """The index of the option to take for each weight.

    Args:
        options: for each weight the (bytes, loss) of its options.
        budget: bytes for all weights; if even the smallest options exceed it, those are taken.
    """
    return choose_among([[Alternative(0, options)]], budget)[0][1]


def choose_among(groups: Sequence[Sequence[Alternative]], budget: int) -> list[tuple[int, list[int]]]:
    """For each group the index of the alternative to take, and of the option for each of its weights.

    Args:
        groups: the alternatives of each.
        budget: bytes for all groups; if even the smallest choice exceeds it, that is taken.
    """
    if all(len(group) == 1 for group in groups):
        return _best(groups, budget, CELLS)
    first = [which for which, _ in _best(groups, budget, FEW_CELLS)]
    found = _best([[group[which]] for group, which in zip(groups, first, strict=True)], budget, CELLS)
    return [(which, choice) for which, (_, choice) in zip(first, found, strict=True)]


def _best(groups: Sequence[Sequence[Alternative]], budget: int, most: int) -> list[tuple[int, list[int]]]:
    """`choose_among` in at most so many cells."""
    floors = [min(one.least_bytes for one in group) for group in groups]
    spare = max(budget - sum(floors), 0)
    cell = max(-(-spare // most), 1)
    cells = spare // cell
    least = torch.zeros(cells + 1, dtype=torch.float64)  # (cells + 1,): of the groups so far, within so many cells
    tables = []
    for group, floor in zip(groups, floors, strict=True):
        tried = [_spent(one, _cells(one.least_bytes - floor, cell), least, cell) for one in group]
        least, which = torch.stack([after for after, _ in tried]).min(0)
        tables.append((which.to(torch.int16), [taken for _, taken in tried]))
    found, left = [], cells
    for group, floor, (which, taken) in zip(reversed(groups), reversed(floors), reversed(tables), strict=True):
        index = int(which[left])
        choice = []
        for pairs, best in zip(reversed(group[index].options), reversed(taken[index]), strict=True):
            choice.append(int(best[left]))
            left -= _cells(pairs[choice[-1]][0] - _smallest(pairs), cell)
        left -= _cells(group[index].least_bytes - floor, cell)
        found.append((index, choice[::-1]))
    return found[::-1]


def _spent(one: Alternative, start: int, least: Tensor, cell: int) -> tuple[Tensor, list[Tensor]]:
    """The least loss once a group has taken an alternative that costs `start` cells, and each weight's best option.

    Args:
        one: the alternative.
        start: cells above the group's smallest choice.
        least: (cells + 1,), the loss before.
        cell: bytes.

    Returns:
        (cells + 1,) float64, infinite where the alternative does not fit; for each weight (cells + 1,) int16.
    """
    least, taken = _later(least, start), []
    for pairs in one.options:
        losses = torch.stack([_later(least, _cells(size - _smallest(pairs), cell)) + loss for size, loss in pairs])
        least, best = losses.min(0)
        taken.append(best.to(torch.int16))
    return least, taken


def _later(least: Tensor, steps: int) -> Tensor:
    """(cells + 1,) moved by some cells, infinite before."""
    return torch.cat(
        [torch.full((min(steps, len(least)),), torch.inf, dtype=least.dtype), least[: max(len(least) - steps, 0)]]
    )


def _cells(size: int, cell: int) -> int:
    return -(-size // cell)


def _smallest(pairs: Sequence[_Pair]) -> int:
    return min(size for size, _ in pairs)
