"""How a packed file describes a quantized tensor."""

import math
from dataclasses import dataclass, fields
from typing import Any

from ..accounting import int_bytes, pq_bytes
from ..errors import DamagedFileError
from ..scalar import SCHEMES, bits_of
from ..utils.bits import code_bits

_MOST_DIMENSIONS = 5  # of a weight: those of a Conv3d


@dataclass(frozen=True)
class QuantizedTensor:
    """A tensor that is stored in a quantized form."""

    scheme: str  # pq, int2 ... int8
    shape: tuple[int, ...]  # of the dense tensor
    block_size: int | None = None  # d, of pq
    n_centroids: int | None = None  # K, of pq
    centroid_bits: int = 16  # of pq: 16 (fp16) or 8
    channels: int = 1  # of intN: how many scales
    codebook: str | None = None  # of pq: the tensor whose centroids it uses; None: its own

    @property
    def bits(self) -> int | None:
        """N of intN; None for pq."""
        return bits_of(self.scheme)

    @property
    def n_codes(self) -> int:
        """Codes in the tensor."""
        return math.prod(self.shape) // (self.block_size or 1)

    @property
    def code_bits(self) -> int:
        """Bits of a code in the file."""
        return self.bits or code_bits(self.n_centroids or 1)

    @property
    def paper_bytes(self) -> float:
        """By the paper's accounting (`accounting.py`)."""
        if self.block_size is None or self.n_centroids is None:
            return int_bytes(math.prod(self.shape), self.bits or 32)
        return pq_bytes(self.n_codes, self.block_size, self.n_centroids, 0 if self.codebook else self.centroid_bits)

    def to_dict(self) -> dict[str, Any]:
        """The fields that are not the default."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}

    def check(self) -> None:
        """Refuse what no version writes. Raises DamagedFileError."""
        numbers = (*self.shape, self.channels, self.centroid_bits)
        if self.scheme == "pq":
            fits = self.block_size is not None and self.n_centroids in range(257) and self.centroid_bits in (8, 16)
            numbers += (self.block_size, self.n_centroids)  # type: ignore[operator]
        else:
            fits = self.scheme in SCHEMES and self.block_size is None and self.n_centroids is self.codebook is None
        fits = fits and 2 <= len(self.shape) <= _MOST_DIMENSIONS
        fits = fits and (self.codebook is None or (isinstance(self.codebook, str) and self.codebook != ""))
        if not fits or not all(type(n) is int and n > 0 for n in numbers):
            raise DamagedFileError(f"its manifest is damaged (a tensor entry {self!r} that no version writes)")
