"""Count bytes as the paper does: codes of log2 K bits, centroids, and what stays dense."""

import math
from collections.abc import Iterable

from .scalar import bits_of

MIB = 2**20


def pq_bytes(n_blocks: int, block_size: int, n_centroids: int, centroid_bits: int = 16) -> float:
    """Bytes of one pq weight by the paper's accounting: n log2(K) / 8 for the codes, K d bits / 8 for the centroids.

    Args:
        n_blocks: n, the number of blocks and so of codes.
        block_size: d, the numbers in a block.
        n_centroids: K.
        centroid_bits: bits of a centroid's number, 16 (fp16) or 8 (int8).
    """
    return n_blocks * math.log2(max(n_centroids, 1)) / 8 + n_centroids * block_size * centroid_bits / 8


def int_bytes(numbers: int, bits: int) -> float:
    """Bytes of so many numbers at N bits each; scales do not count, as in the paper."""
    return numbers * bits / 8


def rest_bits(schemes: Iterable[str], dense: int = 32) -> int:
    """Bits per number that the paper counts for biases and norms: N if all weights have one scheme intN, else `dense`.

    Args:
        schemes: of all weights, that of a dense one included.
        dense: bits of a number without codes, 32 in the paper.
    """
    found = set(schemes)
    return (bits_of(found.pop()) if len(found) == 1 else None) or dense
