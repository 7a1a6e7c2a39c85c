"""How a packed file describes, stores and checks a product-quantized weight (`pq.py`), of O rows."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..accounting import pq_bytes
from ..scalar import Affine, is_affine
from ..utils.bits import MOST_CENTROIDS, code_bits, largest_code, unpack_bits
from .parts import AFFINE, CENTROID_BITS, CENTROIDS, CODEBOOK, CODES, FILE_AFFINE, SCALES
from .quantized import QuantizedWeight
from .registry import QuantizedTensor


class PackedPQ(QuantizedWeight):
    """The part of `PQWeight` that knows files."""

    file_parts = (CODES, CENTROIDS, AFFINE, SCALES)

    @classmethod
    def describes(cls, entry: QuantizedTensor) -> bool:
        """Whether it has d, K (at most 4096) and centroids of 8 or 16 bits."""
        k_fits = entry.n_centroids in range(MOST_CENTROIDS + 1)
        return k_fits and entry.block_size is not None and entry.centroid_bits in (8, 16)

    @classmethod
    def code_bits(cls, entry: QuantizedTensor) -> int:
        """Bits of a code: log2 K, rounded up (at least 1)."""
        return code_bits(entry.n_centroids or 1)

    @classmethod
    def size(cls, entry: QuantizedTensor) -> float:
        """Bytes: log2 K bits a code, fp16 row scales, and the centroids (fp16 or int8) with the codebook's tensor."""
        bits, scales = 0 if entry.codebook else entry.centroid_bits, entry.shape[0] if entry.row_scales else 0
        return pq_bytes(entry.n_codes, entry.block_size or 1, entry.n_centroids or 1, bits, scales)

    @classmethod
    def file_types(cls, entry: QuantizedTensor) -> dict[str, torch.dtype]:
        """Codes (bytes,); with its own codebook centroids (K, d), fp16, or uint8 with scale and zero point (2, 1).

        And, with row scales, these: (O,) fp16.
        """
        found = {CODES: torch.uint8} | ({SCALES: torch.float16} if entry.row_scales else {})
        if entry.codebook is not None:
            return found
        if entry.centroid_bits == 16:
            return found | {CENTROIDS: torch.float16}
        return found | {CENTROIDS: torch.uint8, AFFINE: torch.float32}

    @classmethod
    def wrong(cls, entry: QuantizedTensor, parts: Mapping[str, Tensor]) -> str | None:
        """What is wrong with d, codes (bytes,), centroids (K, d), their affine (2, 1) or row scales (O,)."""
        if math.prod(entry.shape[1:]) % (entry.block_size or 1) or entry.channels != 1:
            return "block size or channels"
        if not entry.holds(parts[CODES]):
            return "codes' shape"
        if AFFINE in parts and not is_affine(parts[AFFINE], entry.channels, entry.centroid_bits):
            return "scales or zero points"
        k, centroids = entry.n_centroids or 0, parts.get(CENTROIDS)
        if centroids is not None and tuple(centroids.shape) != (k, entry.block_size):
            return "centroids' shape"
        if k < 2**entry.code_bits and largest_code(parts[CODES], entry.n_codes, entry.code_bits) >= k:
            return f"a code beyond its {k} centroids"
        if centroids is not None and centroids.is_floating_point() and not bool(torch.isfinite(centroids).all()):
            return "a centroid that is not finite"
        scales = parts.get(SCALES)
        if scales is not None and tuple(scales.shape) != entry.shape[:1]:
            return "row scales' shape"
        return None if scales is None or bool(torch.isfinite(scales).all()) else "a row scale that is not finite"

    @classmethod
    def unpack(cls, entry: QuantizedTensor, parts: Mapping[str, Tensor], codebook: int | None) -> dict[str, Tensor]:
        """Codes (O, blocks a row) as in memory; centroids (K, d) and row scales (O,) in fp32; how the centroids lie."""
        state = {CODES: unpack_bits(parts[CODES], entry.n_codes, entry.code_bits).view(entry.shape[0], -1)}
        if entry.row_scales:
            state[SCALES] = parts[SCALES].float()
        if codebook is not None:
            state[CODEBOOK] = torch.tensor(codebook, dtype=torch.int32)
        if entry.centroid_bits == 16:
            return state | {CENTROIDS: parts[CENTROIDS].float()}
        return state | {
            CENTROIDS: Affine.of_tensor(parts[AFFINE], entry.centroid_bits).decode(parts[CENTROIDS]),
            FILE_AFFINE: parts[AFFINE],
            CENTROID_BITS: torch.tensor(entry.centroid_bits, dtype=torch.uint8),
        }
