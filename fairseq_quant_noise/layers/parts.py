"""The names of a quantized weight's entries, after the weight's name, in a state and in a packed file."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import DamagedFileError
from ..scalar import BITS
from ..weights.access import LATENT

__all__ = [
    "AFFINE",
    "AGE",
    "CENTROIDS",
    "CENTROID_BITS",
    "CODEBOOK",
    "CODES",
    "DISTANCES",
    "FILE_AFFINE",
    "LATENT",
    "LATENT_FACTOR",
    "LATENT_WEIGHT",
    "LOG_SCALE",
    "SPEC",
    "numbers_in",
]

CODES = "codes"
CENTROIDS = "centroids"
CENTROID_BITS = "centroid_bits"
FILE_AFFINE = "file_affine"  # scale and zero point of a file's int8 centroids
CODEBOOK = "codebook"  # the number of a shared codebook
LATENT_WEIGHT = "latent_weight"  # the dense weight whose nearest centroids the codes are, over its factor
LATENT_FACTOR = "latent_factor"
DISTANCES = "distances"  # of the dense weight's blocks to their centroids, when they were last encoded
SPEC = "scalar"  # N and the range
AFFINE = "affine"  # scales and zero points
AGE = "age"  # training forwards
LOG_SCALE = "log_scale"  # of a learned scale, the logarithm of its ratio to where it started


def numbers_in(name: str, spec: Tensor, count: int, ranges: Sequence[str]) -> list[int]:
    """The numbers of an entry that begins with N and the place of a range in `ranges`.

    Args:
        name: of the entry, for the message.
        spec: the entry, (count,) uint8.
        count: how many numbers it should hold.
        ranges: the kinds of range that it may name.

    Raises:
        DamagedFileError: it holds something else.
    """
    numbers: list[int] = spec.tolist() if spec.dtype == torch.uint8 and tuple(spec.shape) == (count,) else []
    if not numbers or numbers[0] not in BITS or numbers[1] >= len(ranges):
        what = f"{numbers}" if numbers else f"{tuple(spec.shape)} {spec.dtype}"
        raise DamagedFileError(
            f"{name}: damaged, it holds {what} and not a number of bits from 2 to 8 and the number of a range; "
            "give an earlier checkpoint"
        )
    return numbers
