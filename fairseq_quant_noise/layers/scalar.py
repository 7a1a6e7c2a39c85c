"""A weight in N-bit codes (`scalar/affine.py`), as a packed file holds it; while it is trained, see `latent.py`."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..accounting import int_bytes
from ..scalar import RANGES, Affine
from .parts import AFFINE, CODES, SPEC
from .quantized import QuantizedWeight


class ScalarWeight(QuantizedWeight):
    """What both forms have in common."""

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

    @property
    def paper_bytes(self) -> float:
        """N bits a number."""
        return int_bytes(self.shape.numel(), self.bits)


class IntWeight(ScalarWeight):
    """A weight in N-bit codes that is not trained any more.

    Args:
        codes: uint8, of the weight's shape.
        affine: (2, 1) or (2, C): scales and zero points (`Affine.to_tensor`), float32.
        bits: N.
        dtype: of the decoded weight; it follows `.half()` and `.to(dtype)`, the scales stay in float32.
    """

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
        """Of the decoded weight."""
        return self._dtype

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """Of the weight."""
        return self.codes.shape

    def decode(self) -> Tensor:
        """(q - z) * s."""
        return Affine.of_tensor(self.affine, self.bits).decode(self.codes).to(self._dtype)

    def parts(self) -> dict[str, Tensor]:
        """Codes (a byte each), scales and zero points."""
        return {CODES: self.codes, AFFINE: self.affine}

    def _apply(self, fn: Any, recurse: bool = True) -> "IntWeight":
        super()._apply(fn, recurse)
        self._dtype = fn(torch.empty(0, dtype=self._dtype)).dtype
        return self

    def extra_repr(self) -> str:
        """Shape and bits, for printing."""
        return f"shape={tuple(self.shape)}, bits={self.bits}"


def spec_of(parts: Mapping[str, Tensor]) -> tuple[int, str]:
    """(N, range) of the entry `scalar` of a state."""
    bits, index = parts[SPEC].tolist()
    return bits, RANGES[index]
