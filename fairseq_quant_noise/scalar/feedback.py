"""Error feedback for N-bit codes: round a weight by what the outputs of its layer lose, not number by number.

A weight W (O, I) that multiplies inputs x costs its layer L = sum_r g_r e_r M e_r^T, with e = W_hat - W, M = E[x x^T]
and g_r how much output r counts (`pq/feedback.py` does the same for product quantization). From the nearest codes, L
falls in three ways:

feed back   Columns are rounded from left to right. The error of one, c, is taken up by the columns to its right, which
            move by the step of least L: with M^-1 = U^T U, U upper triangular, W_rest -= e_c U_c,rest / U_cc
            (GPTQ, arXiv 2210.17323).
fit         The scales of least L for these codes, where scales are free: s = (n M w^T) / (n M n^T) with n = q - z.
descend     Each column in turn takes the codes of least L beside all other columns as they are.

A range of min and max is not free: it is read off the rounded weight again wherever that is used. So the numbers at its
ends keep their codes.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .affine import Affine

ROUNDS = 2  # of fitting and feeding back again
DESCENTS = 2  # over all columns, at the end
_COLUMNS = 64  # whose errors go to the columns beyond them together
_NUMBERS = 2**22  # of the rows that are rounded together


def refined(
    weight: Tensor, metric: Tensor, factor: Tensor, affine: Affine, *, rows: Tensor, free: bool
) -> tuple[Tensor, Affine]:
    """Codes of a weight, by error feedback.

    Args:
        weight: W, (O, I) float32.
        metric: M, (I, I) float32.
        factor: U, (I, I) float32.
        affine: the codes that numbers have by themselves, with (1,) or (O,) scales.
        rows: g, (O,) float32.
        free: whether scales may move.

    Returns:
        Codes (O, I) uint8; their scales and zero points, those of `affine` unless they are free.
    """
    parts = _parts(weight, metric, factor, affine, free)
    for _ in range(ROUNDS if free else 0):
        codes = torch.cat([part.fed_back() for part in parts])
        affine = _fitted(weight, metric, affine, codes, rows)
        parts = _parts(weight, metric, factor, affine, free)
    return torch.cat([part.descended(part.fed_back()) for part in parts]).to(torch.uint8), affine


@dataclass(frozen=True)
class _Part:
    """Some rows of a weight: (n, I)."""

    weight: Tensor  # (n, I) float32
    metric: Tensor  # (I, I) float32
    factor: Tensor  # (I, I) float32
    affine: Affine  # (1,) or (n,) scales
    fixed: Tensor | None  # (n, I) bool: whose codes are those of the numbers by themselves

    def _codes(self, numbers: Tensor, column: int) -> Tensor:
        """The codes (n,) float32 of the numbers (n,) that would be best in a column."""
        codes = self.affine.rounded(numbers)
        if self.fixed is None:
            return codes
        return torch.where(self.fixed[:, column], self.affine.rounded(self.weight[:, column]), codes)

    def fed_back(self) -> Tensor:
        """Codes (n, I) float32 by error feedback."""
        left, codes = self.weight.clone(), torch.empty_like(self.weight)
        for start in range(0, left.shape[1], _COLUMNS):
            stop = min(start + _COLUMNS, left.shape[1])
            errors = left.new_empty(len(left), stop - start)  # of each column, over U_cc
            for i in range(start, stop):
                codes[:, i] = self._codes(left[:, i], i)
                error = left[:, i] - self.affine.decode(codes[:, i])
                errors[:, i - start] = error / self.factor[i, i]
                left[:, i + 1 : stop].addr_(errors[:, i - start], self.factor[i, i + 1 : stop], alpha=-1)
            left[:, stop:].addmm_(errors, self.factor[start:stop, stop:], alpha=-1)
        return codes

    def descended(self, codes: Tensor) -> Tensor:
        """Codes (n, I) float32 after DESCENTS turns of each column, from codes (n, I)."""
        errors = self.affine.decode(codes) - self.weight
        for _ in range(DESCENTS):
            slopes = errors @ self.metric  # (n, I), half the gradient of L
            for i in range(codes.shape[1]):
                best = self.weight[:, i] + errors[:, i] - slopes[:, i] / self.metric[i, i]  # were the column free
                codes[:, i] = self._codes(best, i)
                moved = self.affine.decode(codes[:, i]) - self.weight[:, i] - errors[:, i]
                slopes.addr_(moved, self.metric[i])
                errors[:, i] += moved
        return codes


def _parts(weight: Tensor, metric: Tensor, factor: Tensor, affine: Affine, free: bool) -> list[_Part]:
    """The weight in parts of _NUMBERS numbers at most, which a processor's caches hold."""
    fixed = None if free else _ends(weight, affine)
    parts, step = [], max(_NUMBERS // weight.shape[1], 1)
    for start in range(0, len(weight), step):
        own = slice(start, start + step)
        grid = affine
        if affine.per_channel:
            grid = replace(affine, scale=affine.scale[own], zero_point=affine.zero_point[own])
        parts.append(_Part(weight[own], metric, factor, grid, None if fixed is None else fixed[own]))
    return parts


def _ends(weight: Tensor, affine: Affine) -> Tensor:
    """Where the least and the largest number of each range are: (O, I) bool."""
    ranges = weight if affine.per_channel else weight.reshape(1, -1)
    found = torch.zeros_like(ranges, dtype=torch.bool)
    for at in (ranges.argmin(1), ranges.argmax(1)):
        found.scatter_(1, at[:, None], True)
    return found.view_as(weight)


def _fitted(weight: Tensor, metric: Tensor, affine: Affine, codes: Tensor, rows: Tensor) -> Affine:
    """The scales of least L for codes (O, I), with the same zero points."""
    numbers = affine.decode(codes)
    turned = (numbers @ metric).mul_(rows[:, None])
    wanted, own = (turned * weight).sum(1, dtype=torch.float64), (turned * numbers).sum(1, dtype=torch.float64)
    if not affine.per_channel:
        wanted, own = wanted.sum().reshape(1), own.sum().reshape(1)
    factor = (wanted / own).float()
    sound = factor.isfinite() & (factor > 0)
    return replace(affine, scale=torch.where(sound, affine.scale * factor, affine.scale))
