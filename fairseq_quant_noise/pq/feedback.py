"""Error feedback: codes and centroids by what the outputs of a layer lose, not the numbers of its weight.

k-means minimizes squared errors of numbers. A weight W of (O, I) numbers that multiplies inputs x costs its layer

    L = sum_r g_r e_r M e_r^T,    e = W_hat - W,    M = E[x x^T],    g_r >= 0 how much output r counts

in which errors of correlated inputs can cancel. From the codes and centroids of k-means, L falls in three ways:

feed back   Block columns are encoded from left to right. The error of one, c, is taken up by the columns to its right,
            which move by the step of least L: with M^-1 = U^T U, U upper triangular, W_rest -= e_c U_cc^-1 U_c,rest.
            So the distance in which a block finds its centroid is || (b - c) U_cc^-1 || (GPTQ, arXiv 2210.17323; with
            blocks, GPTVQ, arXiv 2402.15319).
fit         The centroids of least L for these codes: linear least squares, by conjugate gradients.
descend     Each block column in turn takes the codes of least L beside all other columns as they are.

Shapes: O rows, I inputs, d numbers a block, K centroids.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..utils.bits import code_dtype
from .encode import FP16_MAX, nearest

ROUNDS = 3  # of feeding back and fitting
DESCENTS = 2  # over all block columns, at the end
STEPS = 6  # of conjugate gradients, from the centroids of the round before
RIDGE = 1e-3  # how much centroids that hardly any error depends on stay where they are, as a share of the mean


@dataclass(frozen=True)
class Layer:
    """A weight and what its errors cost."""

    weight: Tensor  # W: (O, I) float32
    metric: Tensor  # M: (I, I) float64, symmetric and positive definite
    rows: Tensor  # g: (O,) float32

    @property
    def correlated(self) -> bool:
        """Whether M is more than its diagonal."""
        return not torch.equal(self.metric, self.metric.diagonal().diag())

    @cached_property
    def single(self) -> Tensor:
        """M in float32: (I, I)."""
        return self.metric.float()

    @cached_property
    def factor(self) -> Tensor:
        """U: (I, I) float32, upper triangular."""
        return torch.linalg.cholesky(torch.linalg.inv(self.metric), upper=True).float()

    def slope(self, errors: Tensor) -> Tensor:
        """Half the gradient of L by e, g e M: (O, I) -> (O, I)."""
        return (errors @ self.single).mul_(self.rows[:, None])

    def loss(self, errors: Tensor) -> float:
        """L of errors (O, I)."""
        return float((self.slope(errors) * errors).sum(dtype=torch.float64))

    def fed_back(self, centroids: Tensor) -> Tensor:
        """The codes (O, I/d) int64 that centroids (K, d) have by error feedback."""
        left, d = self.weight.clone(), centroids.shape[1]
        codes = []
        for start in range(0, left.shape[1], d):
            own, rest = slice(start, start + d), slice(start + d, None)
            turn = torch.linalg.inv(self.factor[own, own])  # (d, d): in its coordinates, distances are those of L
            blocks, turned = left[:, own] @ turn, centroids @ turn  # (O, d), (K, d)
            codes.append(nearest(blocks, turned))
            left[:, rest].addmm_(blocks - turned[codes[-1]], self.factor[own, rest], alpha=-1)
        return torch.stack(codes, 1)

    def descended(self, codes: Tensor, centroids: Tensor) -> Tensor:
        """The codes (O, I/d) after DESCENTS turns of each block column, from codes (O, I/d) and centroids (K, d)."""
        codes, d = codes.clone(), centroids.shape[1]
        errors = centroids[codes].view_as(self.weight) - self.weight  # (O, I)
        for _ in range(DESCENTS):
            for column in range(codes.shape[1]):
                own = slice(column * d, column * d + d)
                root = torch.linalg.cholesky(self.metric[own, own]).float()  # (d, d)
                others = errors @ self.single[:, own] - errors[:, own] @ self.single[own, own]  # (O, d)
                best = self.weight[:, own] - torch.cholesky_solve(others.t(), root).t()  # (O, d), were all numbers free
                codes[:, column] = nearest(best @ root, centroids @ root)
                errors[:, own] = centroids[codes[:, column]] - self.weight[:, own]
        return codes


def refined(layers: Sequence[Layer], centroids: Tensor) -> tuple[list[Tensor], Tensor]:
    """Codes and centroids of weights that share a codebook, by error feedback.

    Args:
        layers: the weights, and what their errors cost.
        centroids: (K, d) float32, those of k-means.

    Returns:
        For each weight its codes (O, I/d) uint8, or int32 where K is above 256; and the centroids (K, d) float32.
    """
    for _ in range(ROUNDS):
        centroids = _fitted(layers, [layer.fed_back(centroids) for layer in layers], centroids)
    codes = [layer.descended(layer.fed_back(centroids), centroids) for layer in layers]
    return [found.to(code_dtype(len(centroids))) for found in codes], centroids


def _fitted(layers: Sequence[Layer], codes: Sequence[Tensor], centroids: Tensor) -> Tensor:
    """The centroids (K, d) of least total L for codes (O, I/d) each, near those given."""

    def sums(of_numbers: Sequence[Tensor]) -> Tensor:
        """Sums over the blocks of each centroid: (O, I) each -> (K, d)."""
        total = torch.zeros_like(centroids, dtype=torch.float64)
        for part, numbers in zip(codes, of_numbers, strict=True):
            total.index_put_((part.flatten(),), numbers.reshape(-1, centroids.shape[1]).double(), accumulate=True)
        return total

    def slope(of: Tensor) -> Tensor:
        """Half the gradient of L by the centroids, were W zero and they `of` (K, d): (K, d) float64."""
        seen = [of.float()[part].view_as(layer.weight) for layer, part in zip(layers, codes, strict=True)]
        return sums([layer.slope(numbers) for layer, numbers in zip(layers, seen, strict=True)]) + ridge * of

    own = sums([layer.rows[:, None] * layer.single.diagonal() for layer in layers])  # (K, d), of blocks by themselves
    ridge = RIDGE * own.mean()
    scale = 1 / (own + ridge)  # the preconditioner
    found = centroids.double()
    wanted = sums([layer.slope(layer.weight) for layer in layers]) + ridge * found  # (K, d)
    left = wanted - slope(found)
    step = scale * left
    energy = (left * step).sum()
    for _ in range(STEPS):
        if not energy > 0:
            break
        turned = slope(step)
        length = energy / (step * turned).sum()
        found, left = found + length * step, left - length * turned
        before, energy = energy, (left * scale * left).sum()
        step = scale * left + energy / before * step
    return found.clamp(-FP16_MAX, FP16_MAX).float()
