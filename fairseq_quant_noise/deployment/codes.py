"""Unpack codes of N bits in an ONNX graph, so that a model is as small as the packed file (`utils/bits.py`).

Eight codes take N bytes. Code i of the eight begins in byte j = i N // 8, at bit o = i N % 8, and may end in the next:

    code_i = (byte_j >> o | byte_(j + 1) << (8 - o)) & (2^N - 1)

A code of 9 bits or more may touch three bytes, which make one number of 32 bits first:

    code_i = (byte_j | byte_(j + 1) << 8 | byte_(j + 2) << 16) >> o & (2^N - 1)
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .builder import Builder


def add_codes(graph: Builder, name: str, packed: Tensor, bits: int, shape: Sequence[int]) -> str:
    """Make the tensor `name` of codes, uint8, or uint32 of 9 bits or more; returns the name.

    Args:
        graph: where to.
        name: of the tensor of codes.
        packed: (bytes,) uint8, as the file has them.
        bits: N.
        shape: of the codes.
    """
    if bits == 8:
        return graph.store(name, packed.view(*shape))
    each = _unpacked(graph, name, _eights(graph, name, packed, bits), bits)
    flat = graph.compute(f"{name}.flat", "Reshape", each, graph.numbers(-1))
    used = graph.compute(f"{name}.used", "Slice", flat, graph.numbers(0), graph.numbers(math.prod(shape)))
    return graph.compute(name, "Reshape", used, graph.numbers(*shape))


def add_rows_of_codes(
    graph: Builder, name: str, packed: Tensor, bits: int, shape: tuple[int, int], numbers: str, output: str
) -> str:
    """Make the tensor `output` (..., columns) of those rows of codes, of the type that `add_codes` gives.

    Where a row is a number of whole bytes, rows are unpacked after they are looked up, and the others stay packed.

    Args:
        graph: where to.
        name: of the tensor of all codes.
        packed: as of `add_codes`.
        bits: N.
        shape: of all codes, (rows, columns).
        numbers: the tensor of the rows' numbers, (...) int64.
        output: the name of the rows.
    """
    rows, columns = shape
    if bits == 8 or columns % 8:
        codes = name if name in graph else add_codes(graph, name, packed, bits, shape)
        return graph.compute(output, "Gather", codes, numbers)
    eights = _eights(graph, name, packed, bits)
    by_row = graph.compute(f"{name}.rows", "Reshape", eights, graph.numbers(rows, columns // 8, bits))
    found = graph.compute(f"{output}.found", "Gather", by_row, numbers)  # (..., columns / 8, N)
    each = _unpacked(graph, output, found, bits)  # (..., columns / 8, 8)
    outer = graph.compute(f"{output}.places", "Shape", numbers)
    size = graph.compute(f"{output}.size", "Concat", outer, graph.numbers(columns), axis=0)
    return graph.compute(output, "Reshape", each, size)


def _eights(graph: Builder, name: str, packed: Tensor, bits: int) -> str:
    """The bytes of each eight codes, (n / 8, N); the last are filled up with zeros."""
    return graph.store(f"{name}.packed", F.pad(packed, (0, -len(packed) % bits)).view(-1, bits))


def _unpacked(graph: Builder, name: str, eights: str, bits: int) -> str:
    return (_from_bytes if bits < 8 else _from_words)(graph, name, eights, bits)


def _from_bytes(graph: Builder, name: str, eights: str, bits: int) -> str:
    """Codes (..., 8) uint8 of less than 8 bits, from (..., N) bytes."""
    byte, offset = _places(bits)
    left = (8 - offset).clamp(max=7)  # 7 where nothing of the next byte is needed: bit 7 is in no code
    numbers = {
        "byte": byte,
        "next": (byte + 1).clamp(max=bits - 1),
        "right": offset.to(torch.uint8),
        "left": left.to(torch.uint8),
        "mask": torch.tensor(2**bits - 1, dtype=torch.uint8),
    }
    of = {key: graph.store(f"int{bits}.{key}", tensor) for key, tensor in numbers.items()}
    halves = []
    for key, direction in (("byte", "RIGHT"), ("next", "LEFT")):
        found = graph.compute(f"{name}.{key}", "Gather", eights, of[key], axis=-1)  # (..., 8)
        halves.append(
            graph.compute(f"{name}.{direction}", "BitShift", found, of[direction.lower()], direction=direction)
        )
    both = graph.compute(f"{name}.both", "BitwiseOr", *halves)
    return graph.compute(f"{name}.each", "BitwiseAnd", both, of["mask"])


def _from_words(graph: Builder, name: str, eights: str, bits: int) -> str:
    """Codes (..., 8) uint32 of 9 to 12 bits, from (..., N) bytes."""
    byte, offset = _places(bits)
    word = ""
    for j in range(3):  # where the third byte is beyond the eight codes, it is no part of the last one
        at = graph.store(f"wide{bits}.byte{j}", (byte + j).clamp(max=bits - 1))
        found = graph.compute(f"{name}.byte{j}", "Gather", eights, at, axis=-1)  # (..., 8)
        wide = graph.cast(f"{name}.wide{j}", found, "UINT32")
        up = graph.store(f"wide.up{j}", torch.tensor(8 * j, dtype=torch.uint32))
        moved = graph.compute(f"{name}.moved{j}", "BitShift", wide, up, direction="LEFT")
        word = graph.compute(f"{name}.word{j}", "BitwiseOr", word, moved) if word else moved
    down = graph.store(f"wide{bits}.down", offset.to(torch.uint32))
    shifted = graph.compute(f"{name}.shifted", "BitShift", word, down, direction="RIGHT")
    mask = graph.store(f"wide{bits}.mask", torch.tensor(2**bits - 1, dtype=torch.uint32))
    return graph.compute(f"{name}.each", "BitwiseAnd", shifted, mask)


def _places(bits: int) -> tuple[Tensor, Tensor]:
    """Of each of eight codes: the byte in which it begins, and the bit there, (8,) each."""
    start = torch.arange(8) * bits
    return start // 8, start % 8
