"""The formats of quantized weights: each is a class registered under its name, which the rest of the package asks.

    pq             codes and centroids                                 pq.py         PQWeight
    pq latent      the same, and a dense weight that moves the codes   pq_latent.py  LatentPQWeight
    intN latent    a dense weight in training, seen through codes      latent.py     LatentIntWeight
    intN learned   the same, with scales that learn                    latent.py     LearnedIntWeight
    intN           N-bit codes, scales and zero points                 scalar.py     IntWeight

A scheme (pq, int2 ... int8) is what plans and packed files call a format. `plan_schemes` are those whose stages make
weights of the format, `file_schemes` those whose packed tensors become weights of it: intN is trained in one format and
read from a file in another. `layers/__init__.py` imports every module of the folder, so a format's file registers it.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..errors import DamagedFileError
from ..utils.bits import packed_size
from ..weights.blocks import turn
from ..weights.discovery import Weight
from .parts import LATENT

_MOST_DIMENSIONS = 5  # a Conv3d's weight has five


@dataclass(frozen=True)
class QuantizedTensor:
    """A tensor that a packed file stores in a quantized form, as its manifest describes it."""

    scheme: str  # pq, int2 ... int8
    shape: tuple[int, ...]  # the dense tensor's, as its codes lie
    block_size: int | None = None  # d, of pq
    n_centroids: int | None = None  # K, of pq
    centroid_bits: int = 16  # pq only: 16 (fp16) or 8
    channels: int = 1  # intN only: how many scales
    codebook: str | None = None  # pq only: the tensor whose centroids it uses; None: its own
    transposed: bool = False  # whether the network's tensor has the first two dimensions of `shape` exchanged

    @property
    def format(self) -> "type[Format]":
        """The format that stores it."""
        return file_formats()[self.scheme]

    @property
    def n_codes(self) -> int:
        """Codes in the tensor."""
        return math.prod(self.shape) // (self.block_size or 1)

    @property
    def code_bits(self) -> int:
        """Bits of a code in the file."""
        return self.format.code_bits(self)

    @property
    def paper_bytes(self) -> float:
        """Bytes by the paper's accounting (`accounting.py`)."""
        return self.format.size(self)

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """The shape of the network's tensor."""
        return turn(self.shape) if self.transposed else self.shape

    def holds(self, codes: Tensor) -> bool:
        """Whether `codes` have the shape of this tensor's codes in a file, packed: (bytes,)."""
        return tuple(codes.shape) == (packed_size(self.n_codes, self.code_bits),)

    def to_dict(self) -> dict[str, Any]:
        """The fields that are not the default."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}

    def check(self) -> None:
        """Refuse an entry that no version of this package writes.

        Raises:
            DamagedFileError: a field is missing, or of a type or value that no version writes.
        """
        numbers = [*self.shape, self.channels, self.centroid_bits]
        numbers += [n for n in (self.block_size, self.n_centroids) if n is not None]
        fits = isinstance(self.scheme, str) and self.scheme in file_formats() and self.format.describes(self)
        fits = fits and 2 <= len(self.shape) <= _MOST_DIMENSIONS and type(self.transposed) is bool
        fits = fits and (self.codebook is None or (isinstance(self.codebook, str) and self.codebook != ""))
        if not fits or not all(type(n) is int and n > 0 for n in numbers):
            raise DamagedFileError(f"its manifest is damaged (a tensor entry {self!r} that no version writes)")


class Format:
    """What a format says of itself; `quantized.QuantizedWeight` adds what its weights do in a model.

    A method raises NotImplementedError in a format that does not override it: the methods for packed files in a format
    without `file_schemes`, and those that quantize in one without `plan_schemes` or with a codebook.
    """

    plan_schemes: tuple[str, ...] = ()  # schemes of a plan's stages whose weights get this format
    file_schemes: tuple[str, ...] = ()  # schemes of a packed file whose tensors become weights of this format
    entries: tuple[str, ...]  # names in a state, after the weight's name
    needs: tuple[str, ...]  # the entries by which a state's weight is recognised as one of this format
    file_parts: tuple[str, ...] = ()  # names in a packed file, after the tensor's name
    has_codebook = False  # k-means finds its codes, by the d and K of a plan (`quantization/quantize.py`)

    # A state

    @classmethod
    def adopt(cls, weight: Weight, parts: Mapping[str, Tensor]) -> bool:
        """Make a weight of a model one of this format, ready to load `parts`; returns whether it changed.

        Args:
            weight: in whatever form it is now.
            parts: its entries in the state, such as codes (rows, …).

        Raises:
            UserError: the entries do not fit the weight.
            NotImplementedError: the format does not override it.
        """
        raise NotImplementedError

    @classmethod
    def join(cls, weights: "Sequence[Any]") -> None:
        """Let weights of this format, of one model, hold once what they have in common; by default nothing is."""

    @classmethod
    def dense(cls, parts: Mapping[str, Tensor]) -> Tensor:
        """The dense weight that evaluation sees, (rows, …); a matrix (rows, row length) if `parts` hold no shape.

        Raises:
            NotImplementedError: the format does not override it.
        """
        raise NotImplementedError

    @classmethod
    def dense_shape(cls, parts: Mapping[str, Tensor]) -> tuple[int, ...]:
        """The shape of `dense`, (rows, …).

        Raises:
            NotImplementedError: the format does not override it.
        """
        raise NotImplementedError

    # A packed file, for formats with `file_schemes`

    @classmethod
    def describes(cls, entry: QuantizedTensor) -> bool:
        """Whether `entry` has the fields that this format writes (`check` tests that numbers are whole and above 0).

        Raises:
            NotImplementedError: the format has no `file_schemes`.
        """
        raise NotImplementedError

    @classmethod
    def code_bits(cls, entry: QuantizedTensor) -> int:
        """Bits of a code in the file (N of intN, log2 K of pq rounded up).

        Raises:
            NotImplementedError: the format has no `file_schemes`.
        """
        raise NotImplementedError

    @classmethod
    def size(cls, entry: QuantizedTensor) -> float:
        """Bytes by the paper's accounting (`accounting.py`).

        Raises:
            NotImplementedError: the format has no `file_schemes`.
        """
        raise NotImplementedError

    @classmethod
    def file_types(cls, entry: QuantizedTensor) -> dict[str, torch.dtype]:
        """The parts that the file has of this tensor, no others, and their types; codes are packed, (bytes,).

        Raises:
            NotImplementedError: the format has no `file_schemes`.
        """
        raise NotImplementedError

    @classmethod
    def wrong(cls, entry: QuantizedTensor, parts: Mapping[str, Tensor]) -> str | None:
        """What is wrong with a tensor of a file that may come from anywhere, or None.

        Args:
            entry: checked.
            parts: as `file_types` says, of any shape (…) and content.

        Raises:
            NotImplementedError: the format has no `file_schemes`.
        """
        raise NotImplementedError

    @classmethod
    def unpack(cls, entry: QuantizedTensor, parts: Mapping[str, Tensor], codebook: int | None) -> dict[str, Tensor]:
        """The entries of the state that a model loads.

        Args:
            entry: of the tensor.
            parts: its own in the file, codes packed, (bytes,), and those of the tensor whose codebook it uses.
            codebook: the number of its codebook where several tensors use it.

        Returns:
            The entries by the last part of the name, such as codes (rows, …).

        Raises:
            NotImplementedError: the format has no `file_schemes`.
        """
        raise NotImplementedError

    # Quantizing, for formats with `plan_schemes`; k-means does it for those with a codebook

    @classmethod
    def quantize_(cls, weight: Weight, scheme: str, range_: str) -> Any:
        """Make a dense weight of a model one of this format, and return the new weight.

        Args:
            weight: not quantized yet.
            scheme: of the plan's stage, one of `plan_schemes`.
            range_: tensor, channel or histogram.

        Raises:
            UserError: the weight is quantized already.
            NotImplementedError: the format has no `plan_schemes`, or has a codebook.
        """
        raise NotImplementedError

    @classmethod
    def seen(cls, name: str, dense: Tensor, scheme: str, range_: str) -> Tensor:
        """The weight that evaluation would see after `quantize_`, (rows, …) and dtype as `dense`; nothing is changed.

        Raises:
            UserError: `dense` is not finite; `name` is for the message.
            NotImplementedError: the format has no `plan_schemes`, or has a codebook.
        """
        raise NotImplementedError


F = TypeVar("F", bound=type[Format])
FORMATS: dict[str, type[Format]] = {}


def register(name: str) -> Callable[[F], F]:
    """A class decorator that registers the class as the format `name`.

    Raises:
        ValueError: as the class is decorated; another format has this name, one of its schemes, or the same `needs`.
    """

    def add(format: F) -> F:  # noqa: A002
        """Register `format` and return it.

        Raises:
            ValueError: it cannot be told from another format.
        """
        for other, known in FORMATS.items():
            same = {*format.plan_schemes} & {*known.plan_schemes} or {*format.file_schemes} & {*known.file_schemes}
            if name == other or same or {*format.needs} == {*known.needs}:
                raise ValueError(f"format {name}: cannot be told from {other}")
        FORMATS[name] = format
        return format

    return add


def plan_formats() -> dict[str, type[Format]]:
    """By each scheme that a plan's stage may name, the format of its weights."""
    return {scheme: format for format in FORMATS.values() for scheme in format.plan_schemes}


def file_formats() -> dict[str, type[Format]]:
    """By each scheme of a packed file, the format of its tensors."""
    return {scheme: format for format in FORMATS.values() for scheme in format.file_schemes}


def all_file_parts() -> list[str]:
    """What a packed file may have of a quantized tensor, after its name."""
    return list(dict.fromkeys(part for format in FORMATS.values() for part in format.file_parts))


def all_entries() -> list[str]:
    """What a state may have of a quantized weight, after its name."""
    return list(dict.fromkeys(entry for format in FORMATS.values() for entry in format.entries))


def join_(weights: Iterable[Format]) -> None:
    """Let quantized weights of one model hold once what they have in common, in place.

    Raises:
        UserError: they contradict each other.
    """
    weights = list(weights)
    for format in FORMATS.values():
        format.join([weight for weight in weights if isinstance(weight, format)])


class Held(NamedTuple):
    """A quantized weight of a state."""

    format: type[Format]
    parts: dict[str, Tensor]  # its entries, a dense weight in training as LATENT

    def dense(self) -> Tensor:
        """The weight that evaluation sees, of `shape` (`Format.dense`)."""
        return self.format.dense(self.parts)

    @property
    def shape(self) -> tuple[int, ...]:
        """The dense weight's shape, (rows, …); a matrix (rows, row length) where the entries hold no shape."""
        return self.format.dense_shape(self.parts)


def recognise(state: Mapping[str, Tensor], name: str) -> Held | None:
    """The weight `name` of a state where it is quantized; None where it is dense or absent.

    Args:
        state: tensors by name; the quantized weight's entries follow its name, such as codes (rows, …).
        name: the weight's name, as it is when dense.
    """
    parts = {part: state[key] for part in all_entries() if (key := f"{name}.{part}") in state}
    if parts and name in state:
        parts[LATENT] = state[name]
    fitting = [format for format in FORMATS.values() if parts.keys() >= {*format.needs}]
    return Held(max(fitting, key=lambda format: len(format.needs)), parts) if fitting else None


def weights_in(state: Mapping[str, Tensor]) -> dict[str, Tensor | Held]:
    """The tensors of a state by their dense names, in its order: dense ones as they are, quantized ones as `Held`.

    Args:
        state: by name, dense tensors (…) and the entries of quantized weights, as in `recognise`.
    """
    entries = {*all_entries()}
    owners = {owner for owner, _, last in (key.rpartition(".") for key in state) if last in entries}
    quantized = {owner: held for owner in owners if (held := recognise(state, owner)) is not None}
    found: dict[str, Tensor | Held] = {}
    for key, tensor in state.items():
        owner, _, last = key.rpartition(".")
        name = owner if last in entries and owner in quantized else key
        found[name] = quantized.get(name, tensor)
    return found
