"""Pack codes of N bits without gaps: two int4 codes take a byte, a code of K centroids takes ceil(log2 K) bits.

In memory a code is a byte, or, where N is 9 to 12, an int32: neither gloo nor NCCL sends numbers of 16 bits.

Code i takes the bits i * N to (i + 1) * N - 1 of the stream; bit j of the stream is bit j % 8 of byte j // 8, the least
significant first. The last byte is filled up with zeros.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

MOST_CENTROIDS = 4096  # codes of 12 bits
_CHUNK = 1 << 20  # codes at a time, a multiple of 8: each chunk ends at a byte's end


def code_bits(n_centroids: int) -> int:
    """Bits of a code for K centroids, 1 at least."""
    return max((n_centroids - 1).bit_length(), 1)


def code_dtype(n_centroids: int) -> torch.dtype:
    """The type of codes in memory, for K centroids."""
    return torch.uint8 if n_centroids <= 256 else torch.int32


def packed_size(n_codes: int, bits: int) -> int:
    """Bytes that the codes take."""
    return (n_codes * bits + 7) // 8


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Flatten and pack codes below 2^bits, of any shape, into (packed_size(n_codes, bits),) uint8."""
    flat = codes.detach().cpu().reshape(-1)
    if bits == 8:
        return flat
    parts = [_pack(part.numpy(), bits) for part in flat.split(_CHUNK)]
    return torch.from_numpy(np.concatenate(parts)) if parts else flat


def unpack_bits(packed: Tensor, n_codes: int, bits: int) -> Tensor:
    """The (n_codes,) codes of `pack_bits`, uint8; of more than 8 bits int32.

    Args:
        packed: (packed_size(n_codes, bits),) uint8.
        n_codes: how many codes there are.
        bits: of a code, at most 12.
    """
    if bits == 8:
        return packed
    return torch.from_numpy(np.concatenate([*_chunks(packed, n_codes, bits)]))


def largest_code(packed: Tensor, n_codes: int, bits: int) -> int:
    """The largest of the packed codes, found without all of them unpacked in memory.

    Args:
        packed: (packed_size(n_codes, bits),) uint8.
        n_codes: how many codes there are, at least 1.
        bits: of a code.
    """
    return int(packed.max()) if bits == 8 else max(int(part.max()) for part in _chunks(packed, n_codes, bits))


def _chunks(packed: Tensor, n_codes: int, bits: int) -> Iterator[np.ndarray]:
    step = _CHUNK * bits // 8
    counts = [min(_CHUNK, n_codes - start) for start in range(0, n_codes, _CHUNK)]
    for part, n in zip(packed.split(step), counts, strict=True):
        yield _unpack(part.numpy(), n, bits)


def _pack(codes: np.ndarray, bits: int) -> np.ndarray:
    if bits == 4:
        even = np.append(codes, np.uint8(0)) if len(codes) % 2 else codes
        return even[0::2] | (even[1::2] << 4)
    each = (codes[:, None] >> np.arange(bits, dtype=codes.dtype)) & 1  # (n, bits)
    return np.packbits(each.astype(np.uint8, copy=False).reshape(-1), bitorder="little")


def _unpack(packed: np.ndarray, n_codes: int, bits: int) -> np.ndarray:
    if bits == 4:
        return np.stack([packed & 15, packed >> 4], axis=1).reshape(-1)[:n_codes]
    each = np.unpackbits(packed, bitorder="little")[: n_codes * bits].reshape(n_codes, bits)
    found = np.packbits(each, axis=1, bitorder="little")  # (n, 1), or (n, 2): bytes, the lowest first
    return found.reshape(-1) if bits <= 8 else found.view("<u2").reshape(-1).astype(np.int32)
