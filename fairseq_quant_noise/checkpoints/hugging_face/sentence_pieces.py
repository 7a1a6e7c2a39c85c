"""Read the pieces in a model of SentencePiece, without its library.

The file is a protocol buffer: a row of fields, each a key (number and kind of the field), and a number or a length with
so many bytes. Field 1 of the file is a piece, and field 1 of that its text.
"""

from collections.abc import Iterator
from pathlib import Path

from ...errors import DamagedFileError, UserError

_FIXED = {1: 8, 5: 4}  # bytes of the kinds of fields that have a fixed length


def read_pieces(path: Path) -> list[str]:
    """The pieces in their order.

    Raises:
        UserError: the file cannot be opened.
        DamagedFileError: it is no model of SentencePiece.
    """
    try:
        pieces = [text.decode() for piece in _fields(path.read_bytes(), 1) for text in _fields(piece, 1)]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; download it again") from None
    except (IndexError, ValueError):
        pieces = []
    if not pieces:
        raise DamagedFileError(f"{path}: is no whole model of SentencePiece; download it again")
    return pieces


def _fields(content: bytes, wanted: int) -> Iterator[bytes]:
    """The fields of this number that are bytes. Raises IndexError or ValueError where the content is no buffer."""
    at = 0
    while at < len(content):
        key, at = _number(content, at)
        if key % 8 == 0:
            _, at = _number(content, at)
            continue
        length = _FIXED.get(key % 8)
        if length is None and key % 8 != 2:
            raise ValueError("a kind of field that does not exist")
        if length is None:
            length, at = _number(content, at)
        if at + length > len(content):
            raise ValueError("cut")
        if key == wanted * 8 + 2:
            yield content[at : at + length]
        at += length


def _number(content: bytes, at: int) -> tuple[int, int]:
    """A number, 7 bits a byte from the lowest on, and the place after it."""
    value = shift = 0
    while True:
        byte = content[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
