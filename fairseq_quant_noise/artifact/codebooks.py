"""Measure how a packed file uses its codebooks: centroids in use, and the entropy of the codes.

With n_k of the n codes of a tensor equal to k, and p_k = n_k / n, the entropy is H = -sum_k p_k log2 p_k bits a code.
H = log2 K where all K centroids are used alike; the difference is what an entropy coder could still save. A weight in
intN is read the same way, with the 2^N levels for centroids.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..layers.parts import CODES
from ..utils.bits import unpack_bits
from .packed import Packed


@dataclass(frozen=True)
class CodebookUse:
    """Say how the codes of one tensor use its codebook."""

    tensor: str
    scheme: str
    codes: int  # how many there are
    used: int  # centroids that some code names
    centroids: int  # K, or 2^N
    entropy: float  # bits a code
    capacity: float  # log2 K, or N


def codebook_use(packed: Packed) -> list[CodebookUse]:
    """Measure each tensor of the file that is in codes."""
    found = []
    for name, entry in packed.manifest.tensors.items():
        packed_codes = packed.parts_of(name).get(CODES)
        if packed_codes is None:
            continue
        codes = unpack_bits(packed_codes, entry.n_codes, entry.code_bits)
        k = entry.n_centroids or 2**entry.code_bits
        counts = torch.bincount(codes.flatten(), minlength=k)
        capacity = float(torch.tensor(k, dtype=torch.float64).log2())
        used = int((counts > 0).sum())
        found.append(CodebookUse(name, entry.scheme, entry.n_codes, used, k, entropy(counts), capacity))
    return found


def entropy(counts: Tensor) -> float:
    """Compute the entropy in bits per code, from the (K,) counts of the codes."""
    p = counts[counts > 0].double() / counts.sum()
    return float(-(p * p.log2()).sum()) + 0.0
