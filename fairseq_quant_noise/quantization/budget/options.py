"""Price the ways to store each weight: their bytes in the file, and the loss that their errors would cost.

A weight W is really encoded in each way, as W_hat. To second order, with squared gradients for the curvature
(`quantization/importance.py`), and up to a factor that is the same for all weights,

    L(W_hat) - L(W) ~ e = sum_j h_j (W_hat_j - W_j)^2,    h_j = E[g_j^2]

which holds for a small error of one weight. Errors so large that little of a weight is left are worse together than
the sum of what each does alone. So the predicted loss is e / (1 - r)^2, with r = e / sum_j h_j W_j^2. The power was
found by experiment.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ...layers.quantized import dense_weight
from ...layers.registry import QuantizedTensor, plan_formats
from ...pq.encode import encode
from ...pq.kmeans import effective_centroids
from ...utils.bits import packed_size
from ...utils.progress import watched
from ...weights.blocks import divides
from ...weights.discovery import Weight, find_weights

DENSE, PQ = "dense", "pq"
BLOCK_SIZES = (2, 4, 8, 16)  # d, beside a convolution's own kernel
CENTROIDS = (16, 64, 256)  # K
INTEGERS = ("int3", "int4", "int6", "int8")
RANGE = "channel"  # of the integers: a scale for each row
ITERATIONS = 5  # of k-means: errors are within 4 % of those of a whole encoding
SAMPLE = 1 << 18  # numbers of a weight that are encoded, in whole rows spread over it
_LEAST_LEFT = 0.01  # 1 - r, at least: r may be above 1


@dataclass(frozen=True)
class Option:
    """A way to store a weight."""

    scheme: str  # pq, intN, or dense
    block_size: int | None = None  # d, of pq
    n_centroids: int | None = None  # K, of pq
    bytes: int = 0  # in the file
    loss: float = 0.0  # predicted, up to a factor that is the same for all weights

    def sized(self, shape: tuple[int, ...]) -> "Option":
        """The same with the bytes of a weight of this shape, (rows, …): codes, and fp16 centroids or float32 scales."""
        if self.scheme == DENSE:
            return replace(self, bytes=4 * math.prod(shape))
        entry = QuantizedTensor(self.scheme, shape, self.block_size, self.n_centroids)
        beside = 8 * shape[0] if self.block_size is None else 2 * self.block_size * (self.n_centroids or 0)
        return replace(self, bytes=packed_size(entry.n_codes, entry.code_bits) + beside)


@dataclass(frozen=True)
class Priced:
    """A weight and its options."""

    weight: Weight
    options: Sequence[Option]


def ways(shape: tuple[int, ...]) -> Iterator[Option]:
    """The options of a weight of this shape, (rows, …), with their bytes; dense is the last."""
    kernel = math.prod(shape[2:])
    for d in sorted({*BLOCK_SIZES, kernel} - {1}):
        for k in CENTROIDS if divides(shape, d) else ():
            if effective_centroids(math.prod(shape) // d, k) == k:
                yield Option(PQ, d, k).sized(shape)
    yield from (Option(scheme).sized(shape) for scheme in (*INTEGERS, DENSE))


def price(
    model: nn.Module, importance: Mapping[str, Tensor], progress: Callable[[str], None] = lambda line: None
) -> list[Priced]:
    """The options of each weight of `model` that a plan can name; a tied weight is one.

    Args:
        model: dense, and left so.
        importance: by the tensor's name, a tensor of its shape, such as (out, in) for a Linear; a number of a weight
            without an entry counts as those of the others on average, and all alike where there are no entries.
        progress: called with a line now and then.

    Raises:
        UserError: a weight is quantized already, is not finite, or has ties that cannot be kept.
    """
    means = [float(tensor.float().mean()) for tensor in importance.values()]
    usual = sum(means) / len(means) if means else 1.0
    weights = find_weights(model)
    found = []
    for weight in watched(weights, len(weights), "encoding each weight in several ways", progress):
        weight.check_ties()
        sample = _Sample(weight, importance.get(weight.tensor_name), usual)
        found.append(Priced(weight, [replace(option, loss=sample.loss(option)) for option in ways(weight.shape)]))
    return found


def _known(importance: Tensor) -> Tensor:
    """Importance (rows, …) in which a row of zeros counts as the others do on average.

    No gradient has reached it, as that of a word which the training data lack. Evaluation may have such words, and a
    fine-tuning of few sentences leaves most of a vocabulary so.
    """
    rows = importance.flatten(1).any(1)
    if bool(rows.all()) or not bool(rows.any()):
        return importance
    found = importance.clone()
    found[~rows] = importance[rows].mean(0)
    return found


class _Sample:
    """Rows of a weight, spread over it, that stand for all of it.

    Args:
        weight: dense.
        importance: of the shape that its module stores, or None.
        usual: the importance of a number of a weight without any.
    """

    def __init__(self, weight: Weight, importance: Tensor | None, usual: float) -> None:
        dense = dense_weight(weight).detach().float()
        h = torch.full_like(dense, usual) if importance is None else _known(weight.turn(importance).to(dense))
        rows = slice(None, None, -(-dense.numel() // SAMPLE))
        self.name, self.weighted = weight.name, importance is not None
        self.numbers, self.h = dense[rows].contiguous(), h[rows].contiguous()  # (rows in the sample, …)
        self.squares = float((h * dense.square()).double().sum())  # sum_j h_j W_j^2, of the whole weight

    def loss(self, option: Option) -> float:
        """The predicted loss of the whole weight, whose r is taken to be the sample's."""
        squares = float((self.h * self.numbers.square()).double().sum())
        error = float((self.h * (self.seen(option) - self.numbers).square()).double().sum())
        r = error / squares if squares else 0.0
        return self.squares * r / max(1 - r, _LEAST_LEFT) ** 2

    def seen(self, option: Option) -> Tensor:
        """What evaluation would see of the sample, (rows in the sample, …)."""
        d, k = option.block_size, option.n_centroids
        if option.scheme == DENSE:
            return self.numbers
        if d is None or k is None:
            return plan_formats()[option.scheme].seen(self.name, self.numbers, option.scheme, RANGE)
        importance = self.h if self.weighted else None
        found = encode(self.name, self.numbers, d, k, importance=importance, iterations=ITERATIONS)
        return found.centroids.half().float()[found.codes.long()].view_as(self.numbers)
