"""A weight in N-bit codes (`scalar/affine.py`), as a packed file holds it; while it is trained, see `latent.py`."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..accounting import int_bytes
from ..errors import UserError
from ..kernels import linear_of_codes, takes_integers
from ..scalar import SCHEMES, STAGE_RANGES, Affine, bits_of, is_affine
from ..utils.bits import unpack_bits
from ..weights.discovery import Weight
from .inputs import GRID
from .parts import AFFINE, CODES, SPEC, numbers_in
from .quantized import QuantizedWeight, swap_in
from .registry import QuantizedTensor, register


class ScalarWeight(QuantizedWeight):
    """What the two formats of N-bit codes, in training and after it, have in common; C is 1, or a weight's rows."""

    bits: int  # N
    full_precision = (AFFINE,)
    affine: Tensor  # (2, C): scales and zero points

    @property
    def scheme(self) -> str:  # type: ignore[override]
        """intN."""
        return f"int{self.bits}"

    def facts(self) -> dict[str, Any]:
        """How many scales there are."""
        return {"channels": self.affine.shape[1]}


@register("intN")
class IntWeight(ScalarWeight):
    """A weight in N-bit codes that is not trained any more.

    Args:
        codes: (rows, …) uint8, of the weight's shape.
        affine: (2, 1) or (2, rows): scales and zero points (`Affine.to_tensor`), float32.
        bits: N.
        dtype: of the decoded weight; it follows `.half()` and `.to(dtype)`, the scales stay in float32.
    """

    file_schemes = SCHEMES
    entries = needs = (CODES, AFFINE, SPEC)
    file_parts = (CODES, AFFINE)

    def __init__(self, codes: Tensor, affine: Tensor, bits: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer(CODES, codes)
        self.register_buffer(AFFINE, affine)
        self.register_buffer(SPEC, torch.tensor([bits, 0], dtype=torch.uint8, device=codes.device))
        self._dtype = dtype

    codes: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """The decoded weight's type."""
        return self._dtype

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """The weight's shape."""
        return self.codes.shape

    def decode(self) -> Tensor:
        """(q - z) * s, (rows, …)."""
        return Affine.of_tensor(self.affine, self.bits).decode(self.codes).to(self._dtype)

    def in_integers(self, x: Tensor) -> bool:
        """As `multiplies`: there is no other way."""
        return self.multiplies(x)

    def multiplies(self, x: Tensor) -> bool:
        """Whether `linear` takes x (..., I): gradients are off, the weight is (O, I) in float32, and so is x."""
        settled = not torch.is_grad_enabled() and self.codes.dim() == 2 and self._dtype == torch.float32
        return settled and takes_integers(x)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias in whole numbers, for (..., I) where `multiplies` says so: (..., O).

        x is rounded to 8 bits: to the codes of an input quantizer (`inputs.py`), else on the range of each row.
        """
        return linear_of_codes(x, self.codes, self.affine, bias, getattr(x, GRID, None))

    def has_rows(self) -> bool:
        """Always."""
        return True

    def rows(self, numbers: Tensor) -> Tensor:
        """The rows of these numbers, decoded: (...) int64 -> (..., I)."""
        flat, affine = numbers.flatten(), self.affine
        if affine.shape[1] > 1:
            affine = affine[:, flat]
        found = Affine.of_tensor(affine, self.bits).decode(self.codes[flat]).to(self._dtype)
        return found.view(*numbers.shape, *self.shape[1:])

    def parts(self) -> dict[str, Tensor]:
        """Codes (rows, …) uint8; scales and zero points (2, 1) or (2, rows)."""
        return {CODES: self.codes, AFFINE: self.affine}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "IntWeight":
        super()._apply(fn, recurse)
        self._dtype = fn(torch.empty(0, dtype=self._dtype)).dtype
        return self

    def extra_repr(self) -> str:
        """Shape and bits, for printing."""
        return f"shape={tuple(self.shape)}, bits={self.bits}"

    @classmethod
    def adopt(cls, weight: Weight, parts: Mapping[str, Tensor]) -> bool:
        """Install empty codes (rows, …) and scales (2, C) of the state's shapes; returns whether it did.

        Raises:
            UserError: the codes do not fit the weight's shape.
            DamagedFileError: the entry SPEC holds no N and range.
        """
        codes, (bits, *_) = parts[CODES], spec_of(parts, weight.tensor_name)
        stored: Any = weight.stored
        if tuple(codes.shape) != weight.shape:
            raise UserError(
                f"{weight.name}: codes of shape {tuple(codes.shape)} do not fit a weight of shape {weight.shape}; "
                "the file is of another architecture or dictionary"
            )
        if isinstance(stored, IntWeight) and stored.bits == bits and stored.affine.shape == parts[AFFINE].shape:
            return False
        empty = torch.empty_like(parts[AFFINE], device=stored.device)
        swap_in(weight, cls(torch.empty_like(codes, device=stored.device), empty, bits, stored.dtype))
        return True

    @classmethod
    def dense(cls, parts: Mapping[str, Tensor]) -> Tensor:
        """The decoded weight, (rows, …) float32.

        Raises:
            DamagedFileError: the entry SPEC holds no N and range.
        """
        return cls(parts[CODES], parts[AFFINE], spec_of(parts)[0]).decode()

    @classmethod
    def dense_shape(cls, parts: Mapping[str, Tensor]) -> tuple[int, ...]:
        """(rows, …), the shape of the codes."""
        return tuple(parts[CODES].shape)

    @classmethod
    def describes(cls, entry: QuantizedTensor) -> bool:
        """Whether it has none of pq's fields (blocks, centroids, a codebook)."""
        return all(part is None for part in (entry.block_size, entry.n_centroids, entry.codebook))

    @classmethod
    def code_bits(cls, entry: QuantizedTensor) -> int:
        """N, of the scheme (`intN`)."""
        return bits_of(entry.scheme) or 8

    @classmethod
    def size(cls, entry: QuantizedTensor) -> float:
        """Bytes: N bits a number (the scales do not count)."""
        return int_bytes(entry.n_codes, entry.code_bits)

    @classmethod
    def file_types(cls, entry: QuantizedTensor) -> dict[str, torch.dtype]:
        """Codes (bytes,); scales and zero points (2, C)."""
        return {CODES: torch.uint8, AFFINE: torch.float32}

    @classmethod
    def wrong(cls, entry: QuantizedTensor, parts: Mapping[str, Tensor]) -> str | None:
        """What is wrong with codes (bytes,), or scales and zero points (2, 1) or (2, rows); None if nothing is."""
        if entry.channels not in (1, entry.shape[0]):
            return "block size or channels"
        if not entry.holds(parts[CODES]):
            return "codes' shape"
        return None if is_affine(parts[AFFINE], entry.channels, entry.code_bits) else "scales or zero points"

    @classmethod
    def unpack(cls, entry: QuantizedTensor, parts: Mapping[str, Tensor], codebook: int | None) -> dict[str, Tensor]:
        """Codes (rows, …), a byte each; scales and zero points (2, C); N and the range (2,)."""
        codes = unpack_bits(parts[CODES], entry.n_codes, entry.code_bits)
        spec = torch.tensor([entry.code_bits, 0], dtype=torch.uint8)
        return {CODES: codes.view(entry.shape), AFFINE: parts[AFFINE], SPEC: spec}


def spec_of(parts: Mapping[str, Tensor], name: str = "") -> tuple[int, str, bool]:
    """(N, range, turned?) of the entry SPEC of a state, (2,) or (3,) uint8; `name` is the weight's, for messages.

    Raises:
        DamagedFileError: the entry holds something else.
    """
    turned = tuple(parts[SPEC].shape) == (3,) and int(parts[SPEC][2]) == 1
    bits, index, *_ = numbers_in(f"{name}.{SPEC}".removeprefix("."), parts[SPEC], 2 + turned, STAGE_RANGES)
    return bits, STAGE_RANGES[index], turned
