"""Unpack codes of N bits in an ONNX graph, so that a model is as small as the packed file (`utils/bits.py`).

Eight codes take N bytes. Code i of the eight begins in byte j = i N // 8, at bit o = i N % 8, and may end in the next:

    code_i = (byte_j >> o | byte_(j + 1) << (8 - o)) & (2^N - 1)
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .builder import Builder


def add_codes(graph: Builder, name: str, packed: Tensor, bits: int, shape: Sequence[int]) -> str:
    """Make the tensor `name` of codes, uint8; returns the name.

    Args:
        graph: where to.
        name: of the tensor of codes.
        packed: (bytes,) uint8, as the file has them.
        bits: N.
        shape: of the codes.
    """
    if bits == 8:
        return graph.store(name, packed.view(*shape))
    eights = graph.store(f"{name}.packed", F.pad(packed, (0, -len(packed) % bits)).view(-1, bits))  # (n / 8, N)
    start = torch.arange(8) * bits
    byte, offset = start // 8, start % 8
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
        found = graph.compute(f"{name}.{key}", "Gather", eights, of[key], axis=1)  # (n / 8, 8)
        halves.append(
            graph.compute(f"{name}.{direction}", "BitShift", found, of[direction.lower()], direction=direction)
        )
    both = graph.compute(f"{name}.both", "BitwiseOr", *halves)
    each = graph.compute(f"{name}.each", "BitwiseAnd", both, of["mask"])
    flat = graph.compute(f"{name}.flat", "Reshape", each, graph.numbers(-1))
    used = graph.compute(f"{name}.used", "Slice", flat, graph.numbers(0), graph.numbers(math.prod(shape)))
    return graph.compute(name, "Reshape", used, graph.numbers(*shape))
