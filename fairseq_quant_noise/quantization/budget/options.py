"""Price the ways to store each weight: their bytes in the file, and the loss that their errors would cost.

A weight W is really encoded in each way, as W_hat. To second order, with squared gradients for the curvature
(`quantization/importance.py`), and up to a factor that is the same for all weights,

    L(W_hat) - L(W) ~ e = sum_j h_j (W_hat_j - W_j)^2,    h_j = E[g_j^2]

which holds for a small error of one weight. Errors so large that little of a weight is left are worse together than
the sum of what each does alone. So the predicted loss is e / (1 - r)^2, with r = e / sum_j h_j W_j^2. The power was
found by experiment.

Where a codebook weighs much beside its weight's codes, its numbers may have 8 bits, and weights of one kind may share
it (`choice.py`).
"""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ...layers.pq import PQWeight
from ...layers.quantized import dense_weight
from ...layers.registry import QuantizedTensor, plan_formats
from ...plan.vocabulary import DENSE_BITS
from ...pq.encode import Encoded, encode
from ...pq.kmeans import effective_centroids
from ...utils.bits import packed_size
from ...weights.blocks import divides
from ...weights.discovery import Weight, find_weights

DENSE, PQ = "dense", "pq"
DENSE_DTYPE = "fp16"  # of the plans that are found, for what has no codes
BLOCK_SIZES = (2, 4, 8, 16)  # d, beside a convolution's own kernel
CENTROIDS = (16, 64, 256)  # K
INTEGERS = ("int3", "int4", "int6", "int8")
RANGE = "channel"  # of the integers: a scale for each row
ITERATIONS = 5  # of k-means: errors are within 4 % of those of a whole encoding
SAMPLE = 1 << 18  # numbers of a weight that are encoded, in whole rows spread over it
MUCH = 0.02  # of the codes' bytes: what a codebook must have to be worth 8 bits, or sharing
_LEAST_LEFT = 0.01  # 1 - r, at least: r may be above 1


@dataclass(frozen=True)
class Option:
    """A way to store a weight."""

    scheme: str  # pq, intN, or dense
    block_size: int | None = None  # d, of pq
    n_centroids: int | None = None  # K, of pq
    centroid_bits: int = 16  # of pq: 16 (fp16) or 8
    shared: bool = False  # pq only: whether its codebook is that of other weights of its kind too
    bytes: int = 0  # in the file; with a shared codebook, of the codes alone
    loss: float = 0.0  # predicted, up to a factor that is the same for all weights

    @property
    def codebook(self) -> tuple[int, int, int] | None:
        """d, K and the bits of a centroid's number; None without a codebook."""
        d, k = self.block_size, self.n_centroids
        return None if d is None or k is None else (d, k, self.centroid_bits)

    def sized(self, shape: tuple[int, ...]) -> "Option":
        """The same with the bytes of a weight of this shape, (rows, …): codes, and centroids or float32 scales."""
        if self.scheme == DENSE:
            return replace(self, bytes=DENSE_BITS[DENSE_DTYPE] // 8 * math.prod(shape))
        entry = QuantizedTensor(self.scheme, shape, self.block_size, self.n_centroids)
        beside = codebook_bytes(self.codebook) if self.codebook else 8 * shape[0]
        codes = packed_size(entry.n_codes, entry.code_bits)
        return replace(self, bytes=codes if self.shared else codes + beside)


@dataclass(frozen=True)
class Priced:
    """A weight and its options."""

    weight: Weight
    options: Sequence[Option]  # that are the weight's alone
    shared: Sequence[Option] = ()  # with a codebook that other weights of its kind have in common with it

    @property
    def plain(self) -> list[Option]:
        """The options without centroids in 8 bits, that are the weight's alone."""
        return [option for option in self.options if option.centroid_bits == 16]


def codebook_bytes(codebook: tuple[int, int, int]) -> int:
    """Bytes in the file of a codebook (d, K, bits): numbers in fp16, or in 8 bits with a scale and a zero point."""
    d, k, bits = codebook
    return d * k * bits // 8 + (8 if bits == 8 else 0)


def ways(shape: tuple[int, ...]) -> Iterator[Option]:
    """The options of a weight of this shape, (rows, …), with their bytes; dense is the last."""
    for d, k in block_ways(shape):
        option = Option(PQ, d, k).sized(shape)
        yield option
        if weighs(option):
            yield replace(option, centroid_bits=8).sized(shape)
    yield from (Option(scheme).sized(shape) for scheme in (*INTEGERS, DENSE))


def block_ways(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """The d and K of a weight of this shape, (rows, …), with as many centroids as its blocks feed."""
    for d in _block_sizes(shape):
        for k in CENTROIDS:
            if effective_centroids(math.prod(shape) // d, k) == k:
                yield d, k


def shared_ways(shapes: Sequence[tuple[int, ...]]) -> Iterator[tuple[int, int, list[int]]]:
    """The d and K that weights of these shapes, (rows, …), may share a codebook of, and the places of those it fits.

    They are those where codebooks of their own would take MUCH.
    """
    sizes = [_block_sizes(shape) for shape in shapes]
    for d in sorted({d for of in sizes for d in of}):
        users = [i for i, of in enumerate(sizes) if d in of]
        n_blocks = sum(math.prod(shapes[i]) // d for i in users)
        for k in CENTROIDS if len(users) > 1 else ():
            codes = sum(Option(PQ, d, k, shared=True).sized(shapes[i]).bytes for i in users)
            much = len(users) * codebook_bytes((d, k, 16)) > MUCH * codes
            if much and effective_centroids(n_blocks, k) == k:
                yield d, k, users


def _block_sizes(shape: tuple[int, ...]) -> list[int]:
    return [d for d in sorted({*BLOCK_SIZES, math.prod(shape[2:])} - {1}) if divides(shape, d)]


def weighs(option: Option) -> bool:
    """Whether the codebook of an option with one of its own takes MUCH beside its codes."""
    beside = codebook_bytes(option.codebook) if option.codebook else 0
    return beside > MUCH * (option.bytes - beside)


def samples_of(model: nn.Module, importance: Mapping[str, Tensor]) -> Iterator["Sample"]:
    """A sample of each weight of `model` that a plan can name; arguments and errors are those of `pricing.price`."""
    means = [float(tensor.float().mean()) for tensor in importance.values()]
    usual = sum(means) / len(means) if means else 1.0
    for weight in find_weights(model):
        weight.check_ties()
        if dense_weight(weight).is_meta:
            yield Sample.unknown(weight)
        else:
            yield Sample(weight, importance.get(weight.tensor_name), usual)


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


class Sample:
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
        self.weight, self.weighted = weight, importance is not None
        self.numbers, self.h = dense[rows].contiguous(), h[rows].contiguous()  # (rows in the sample, …)
        self.squares = float((h * dense.square()).double().sum())  # sum_j h_j W_j^2, of the whole weight

    @classmethod
    def unknown(cls, weight: Weight) -> "Sample":
        """The sample of a weight on the meta device: normal numbers, whose errors count as all others do."""
        shape = tuple(weight.shape)
        rows = max(min(shape[0], SAMPLE // math.prod(shape[1:])), 1)
        found = cls.__new__(cls)
        found.weight, found.weighted, found.squares = weight, False, float(math.prod(shape))
        found.numbers = torch.randn((rows, *shape[1:]), generator=torch.Generator().manual_seed(0))
        found.h = torch.ones_like(found.numbers)
        return found

    def thinned(self, step: int) -> "Sample":
        """Each `step`-th of its rows."""
        fewer = copy.copy(self)
        fewer.numbers, fewer.h = self.numbers[::step].contiguous(), self.h[::step].contiguous()
        return fewer

    def priced(self, options: Iterable[Option]) -> list[Option]:
        """The options with their losses; those that differ in the centroids' bits alone are encoded once."""
        found: list[Option] = []
        encoded: tuple[object, Encoded | None] = None, None
        for option in options:
            if encoded[0] != (key := (option.block_size, option.n_centroids)):
                encoded = key, self._encoded(option)
            found.append(replace(option, loss=self.loss(self._seen(option, encoded[1]))))
        return found

    def loss(self, seen: Tensor) -> float:
        """The predicted loss of the whole weight, whose r is taken to be the sample's.

        Args:
            seen: what evaluation would see of the sample, (rows in the sample, …).
        """
        squares = float((self.h * self.numbers.square()).double().sum())
        error = float((self.h * (seen - self.numbers).square()).double().sum())
        r = error / squares if squares else 0.0
        return self.squares * r / max(1 - r, _LEAST_LEFT) ** 2

    def _encoded(self, option: Option) -> Encoded | None:
        if option.block_size is None or option.n_centroids is None:
            return None
        importance = self.h if self.weighted else None
        sizes = option.block_size, option.n_centroids
        return encode(self.weight.name, self.numbers, *sizes, importance=importance, iterations=ITERATIONS)

    def _seen(self, option: Option, encoded: Encoded | None) -> Tensor:
        if option.scheme == DENSE:
            return self.numbers
        if encoded is None:
            return plan_formats()[option.scheme].seen(self.weight.name, self.numbers, option.scheme, RANGE)
        return decoded(encoded, tuple(self.numbers.shape), option.centroid_bits)


@torch.no_grad()
def decoded(encoded: Encoded, shape: tuple[int, ...], centroid_bits: int) -> Tensor:
    """The weight, of `shape` (rows, …), by centroids as a file holds them: in fp16 or in 8 bits."""
    return PQWeight(encoded.codes, encoded.centroids, shape, centroid_bits).eval().decode()
