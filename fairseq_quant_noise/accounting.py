"""The paper's accounting of bytes: codes of log2 K bits, centroids, and what stays dense."""

import math
from collections.abc import Iterable

from .scalar import bits_of

MIB = 2**20


def pq_bytes(n_blocks: int, block_size: int, n_centroids: int, centroid_bits: int = 16) -> float:
    """Codes and centroids of one weight by the paper's accounting: log2 K bits a code, fp16 or int8 centroids."""
    return n_blocks * math.log2(max(n_centroids, 1)) / 8 + n_centroids * block_size * centroid_bits / 8


def int_bytes(numbers: int, bits: int) -> float:
    """N bits a number; the scales apart, as the paper counts."""
    return numbers * bits / 8


def rest_bits(schemes: Iterable[str]) -> int:
    """Bits a number that the paper counts for biases and norms, for the schemes of all weights (see above)."""
    found = set(schemes)
    return (bits_of(found.pop()) if len(found) == 1 else None) or 32
