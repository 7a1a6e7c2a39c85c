"""Limit the header and the decoded size of a packed file relative to its bytes; reader and writer both check."""

import math

from ..errors import DamagedFileError
from .packed import Packed

_HEADER, _HEADER_SHARE = 1 << 20, 16  # a header may have 1 MiB (4,000 tensors) plus 1/16 of the file's bytes
_LONGEST_HEADER = 100_000_000  # bytes; safetensors refuses a longer one
_MOST_DENSE = 1024  # dense bytes for a byte of the file; iPQ at d = 8 and K = 256 has 32


def longest_header(file_bytes: int) -> int:
    """The most bytes of a file's header: in memory, JSON takes some 30 times its length."""
    return min(_HEADER + file_bytes // _HEADER_SHARE, _LONGEST_HEADER)


def check_sizes(packed: Packed, file_bytes: int) -> None:
    """Refuse a file whose network would be implausibly large: few codes of long blocks, a bomb for `to-dense`.

    Raises:
        DamagedFileError: its dense tensors have more than 1,024 times its bytes.
    """
    dense = 4 * sum(math.prod(entry.shape) for entry in packed.manifest.tensors.values())
    if dense > _MOST_DENSE * file_bytes:
        raise DamagedFileError(f"its tensors stand for {dense:,} bytes, which no file of {file_bytes:,} bytes does")
