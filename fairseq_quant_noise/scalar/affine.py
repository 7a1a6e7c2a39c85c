"""Affine codes of N bits: phi_intN of the paper (arXiv 2004.07320), in its standard form.

    s = (max W - min W) / (2^N - 1),   z = round(-min W / s)
    q = clamp(round(w / s) + z, 0, 2^N - 1),   phi(w) = (q - z) * s

with ties rounded to even. Everything is computed in float32, whatever the weight's dtype, and equals torch's
fake-quantize operators bit for bit; on a CPU those take ten times as long.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

#: The bit widths N that have a scheme `intN`.
BITS = range(2, 9)
SCHEMES = tuple(f"int{bits}" for bits in BITS)
_SMALLEST_SCALE = 2.0**-100  # its inverse, and products with the codes, stay in float32's normal range


def bits_of(scheme: str) -> int | None:
    """N of the scheme or kind `intN`; None for any other name."""
    return int(scheme.removeprefix("int")) if scheme in SCHEMES else None


@dataclass(frozen=True)
class Affine:
    """How numbers become codes: of a whole tensor, or of each slice along its first dimension (output channel)."""

    scale: Tensor  # s: (1,) for a tensor, (C,) for C channels; float32
    zero_point: Tensor  # z: as `scale`; int32, in 0 .. 2^N - 1
    bits: int  # N

    @classmethod
    def of_range(cls, low: Tensor, high: Tensor, bits: int) -> "Affine":
        """The codes for numbers between `low` and `high`, (1,) or (C,); the range is widened to hold 0, which is exact.

        A range that is empty (all zeros) gets scale 1.
        """
        low, high = low.float().clamp(max=0), high.float().clamp(min=0)
        steps = 2**bits - 1
        scale = high / steps - low / steps  # not (high - low), which overflows for the largest floats
        scale = torch.where(scale > 0, scale.clamp(min=_SMALLEST_SCALE), torch.ones_like(scale))
        zero_point = (-low / scale).round().clamp(0, steps).int()
        return cls(scale, zero_point, bits)

    @property
    def per_channel(self) -> bool:
        """Whether each channel has its own scale."""
        return self.scale.numel() > 1

    def to_tensor(self) -> Tensor:
        """(2, 1) or (2, C), float32: scales, then zero points, which float32 holds exactly."""
        return torch.stack([self.scale, self.zero_point.float()])

    @classmethod
    def of_tensor(cls, both: Tensor, bits: int) -> "Affine":
        """The inverse of `to_tensor`: `both` is (2, 1) or (2, C), float32."""
        return cls(both[0], both[1].int(), bits)

    def to(self, device: torch.device) -> "Affine":
        """The same codes, for numbers on `device`."""
        if self.scale.device == device:
            return self
        return Affine(self.scale.to(device), self.zero_point.to(device), self.bits)

    def rounded(self, weight: Tensor) -> Tensor:
        """q as float32, of the shape of `weight`: any for one scale, (C, …) for C scales."""
        scale, zero_point = self._spread(weight.dim())
        return (weight.float() * (1 / scale)).round_().add_(zero_point).clamp_(0, 2**self.bits - 1)

    def codes(self, weight: Tensor) -> Tensor:
        """q as uint8, of the shape of `weight`: any for one scale, (C, …) for C scales."""
        return self.rounded(weight).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """(q - z) * s as float32, of the shape of `codes`: any for one scale, (C, …) for C scales."""
        return self.decode_(codes.to(torch.float32, copy=True))

    def decode_(self, rounded: Tensor) -> Tensor:
        """`decode` in place: `rounded` holds q as float32, any shape for one scale, (C, …) for C scales."""
        scale, zero_point = self._spread(rounded.dim())
        return rounded.sub_(zero_point).mul_(scale)

    def _spread(self, dims: int) -> tuple[Tensor, Tensor]:
        """Scale and zero point, ready to broadcast over a tensor of `dims` dimensions."""
        shape = (-1, *[1] * (dims - 1))
        return self.scale.view(shape), self.zero_point.float().view(shape)


def is_affine(both: Tensor, channels: int, bits: int) -> bool:
    """Whether `both` is what `Affine.to_tensor` gives: (2, C), scales above 0 and zero points that are codes.

    Args:
        both: float32, of any shape and content.
        channels: C.
        bits: N.
    """
    if tuple(both.shape) != (2, channels):
        return False
    scale, zero_point = both
    top = 2**bits - 1
    whole = (zero_point == zero_point.round()) & (zero_point >= 0) & (zero_point <= top)
    return bool(((scale * (top + 1)).isfinite() & (scale > 0) & whole).all())


def fake_quantize(weight: Tensor, affine: Affine) -> Tensor:
    """phi_intN(weight), without a gradient, of the shape ((C, …) for C scales) and dtype of `weight`."""
    with torch.no_grad():
        return affine.decode_(affine.rounded(weight.detach())).to(weight.dtype)
