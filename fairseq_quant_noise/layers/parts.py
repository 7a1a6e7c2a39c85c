"""The names of a quantized weight's entries, after the weight's name, in a state and in a packed file."""

import torch
from torch import Tensor

from ..errors import DamagedFileError
from ..scalar import BITS, RANGES
from ..weights.access import LATENT

__all__ = [
    "AFFINE",
    "AGE",
    "CENTROIDS",
    "CENTROID_BITS",
    "CODEBOOK",
    "CODES",
    "FILE_AFFINE",
    "LATENT",
    "SPEC",
    "numbers_in",
]

CODES = "codes"
CENTROIDS = "centroids"
CENTROID_BITS = "centroid_bits"
FILE_AFFINE = "file_affine"  # scale and zero point of a file's int8 centroids
CODEBOOK = "codebook"  # the number of a shared codebook
SPEC = "scalar"  # N and the range
AFFINE = "affine"  # scales and zero points
AGE = "age"  # training forwards


def numbers_in(name: str, spec: Tensor, count: int) -> list[int]:
    """The numbers of an entry that begins with N and the place of a range in RANGES.

    Args:
        name: of the entry, for the message.
        spec: the entry, (count,) uint8.
        count: how many numbers it should hold.

    Raises:
        DamagedFileError: it holds something else.
    """
    numbers: list[int] = spec.tolist() if spec.dtype == torch.uint8 and tuple(spec.shape) == (count,) else []
    if not numbers or numbers[0] not in BITS or numbers[1] >= len(RANGES):
        what = f"{numbers}" if numbers else f"{tuple(spec.shape)} {spec.dtype}"
        raise DamagedFileError(
            f"{name}: damaged, it holds {what} and not a number of bits from 2 to 8 and the number of a range; "
            "give an earlier checkpoint"
        )
    return numbers
