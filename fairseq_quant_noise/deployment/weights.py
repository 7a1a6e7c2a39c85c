"""The tensors of a packed file in an ONNX graph: initializers, and the operators that make weights of them.

    dense   NAME, or of fp16 NAME.stored -> Cast
    pq      NAME.codes (rows, blocks a row) -> Cast -> Gather from NAME.centroids (K, d) -> Reshape
            centroids: fp16 -> Cast, or 8-bit codes as intN; once for all users of a shared codebook
    intN    NAME.codes, of the weight's shape -> Cast -> Sub NAME.zero_point -> Mul NAME.scale

Each makes the tensor NAME, floats as float32. Codes of less than 8 bits are unpacked first (`codes.py`). A runtime
computes all of this once, when it loads the model. DequantizeLinear would say the same of intN, but onnxruntime takes
it as leave to round the inputs of the product to 8 bits, and scores change in the second digit.

Numbers of 8 bits are stored signed, q - 128 with the zero point z - 128: onnxruntime multiplies unsigned inputs by
signed weights several times as fast as by unsigned ones.

Rows that are looked up are decoded after that, so that an embedding stays in codes in memory (`add_rows`). Weights for
products in whole numbers are turned, (inputs, outputs) int8 (`add_integers`), or packed in blocks (`add_nibbles`).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..artifact import Packed
from ..layers.parts import AFFINE, CENTROIDS, CODES
from ..layers.registry import QuantizedTensor
from ..scalar import SCHEMES
from ..utils.bits import pack_bits, unpack_bits
from .builder import Builder
from .codes import add_codes, add_rows_of_codes

#: The schemes of packed files that have a form in ONNX.
KNOWN = ("pq", *SCHEMES)
_PLAIN = (torch.float32, torch.int64, torch.int32, torch.bool)  # stored as the graph reads them
_BLOCKS = (128, 64, 32, 16)  # numbers in a block of MatMulNBits, the fastest first


class Matrix(NamedTuple):
    """A weight in whole numbers: the names of its tensors in the graph. C is 1 (then a scalar) or O."""

    codes: str  # (I, O) int8
    scale: str  # () or (O,) float32
    zero_point: str  # () or (O,) int8


def add_weight(graph: Builder, packed: Packed, name: str) -> str:
    """Make the tensor `name` of the network, at the first call; returns its name in the graph.

    Args:
        graph: where to.
        packed: the file's content, of KNOWN schemes.
        name: as the network calls it.
    """
    name = packed.ties.get(name, name)
    entry = packed.manifest.tensors.get(name)
    if name in graph:
        return name
    if entry is None:
        return _add_dense(graph, name, packed.tensors[name])
    if entry.scheme == "pq":
        codes, centroids = _pq_codes(graph, packed, name, entry), _centroids(graph, packed, name, entry)
        return _add_blocks(graph, name, codes, centroids, graph.numbers(*entry.shape))
    codes, scale, zero_point = _int_codes(graph, packed, name, entry), *_affine(packed, name, len(entry.shape))
    return _decode(graph, name, codes, graph.store(f"{name}.scale", scale), graph.store(f"{name}.zero", zero_point))


def add_rows(graph: Builder, packed: Packed, name: str, numbers: str, output: str) -> str:
    """Make the tensor `output` (..., I) of those rows of a quantized weight (rows, I); returns its name.

    Args:
        graph: where to.
        packed: the file's content, of KNOWN schemes.
        name: of the weight in the file.
        numbers: the tensor of the rows' numbers, (...) int64.
        output: the name of the rows.
    """
    entry = packed.manifest.tensors[name]
    if entry.scheme != "pq" and entry.code_bits == 8:
        found = graph.compute(f"{output}.codes", "Gather", _int_codes(graph, packed, name, entry), numbers)
    else:  # (..., I), or (..., blocks a row)
        of_file, shape = f"{name}.{CODES}", (entry.shape[0], entry.n_codes // entry.shape[0])
        codes, bits = packed.tensors[of_file], entry.code_bits
        found = add_rows_of_codes(graph, of_file, codes, bits, shape, numbers, f"{output}.codes")
    if entry.scheme == "pq":
        outer = graph.compute(f"{output}.outer", "Shape", numbers)
        size = graph.compute(f"{output}.shape", "Concat", outer, graph.numbers(*entry.shape[1:]), axis=0)
        return _add_blocks(graph, output, found, _centroids(graph, packed, name, entry), size)
    of_rows = []
    for key, tensor in zip(("scale", "zero"), _affine(packed, name, len(entry.shape)), strict=True):
        stored = graph.store(f"{name}.{key}", tensor)  # (1, 1) or (rows, 1)
        of_rows.append(stored if len(tensor) == 1 else graph.compute(f"{output}.{key}", "Gather", stored, numbers))
    return _decode(graph, output, found, *of_rows)


def has_integers(packed: Packed, name: str) -> bool:
    """Whether the weight is a matrix of whole numbers of at most 8 bits."""
    entry = packed.manifest.tensors.get(name)
    if entry is None or len(entry.shape) != 2 or entry.transposed:
        return False
    return entry.scheme in SCHEMES or entry.centroid_bits == 8


def add_integers(graph: Builder, packed: Packed, name: str) -> Matrix:
    """The weight (O, I) in whole numbers, for which `has_integers`."""
    entry = packed.manifest.tensors[name]
    turned = f"{name}.turned"
    scale, zero_point = _affine(packed, (entry.codebook or name) if entry.scheme == "pq" else name, 1)
    if scale.numel() == 1:
        scale, zero_point = scale[0], zero_point[0]
    if turned not in graph:
        if entry.scheme == "pq":
            codes, centroids = _pq_codes(graph, packed, name, entry), _stored_centroids(graph, packed, name, entry)
            whole = _add_blocks(graph, f"{name}.whole", codes, centroids, graph.numbers(*entry.shape))
        else:
            codes = _int_codes(graph, packed, name, entry)
            whole = codes if entry.code_bits == 8 else graph.cast(f"{name}.whole", codes, "INT8")
        graph.compute(turned, "Transpose", whole, perm=[1, 0])
    return Matrix(
        turned,
        graph.store(f"{name}.product_scale", scale),
        graph.store(f"{name}.product_zero", zero_point.to(torch.int8)),
    )


def has_nibbles(packed: Packed, name: str) -> bool:
    """Whether the weight is a matrix in int4."""
    entry = packed.manifest.tensors.get(name)
    return entry is not None and entry.scheme == "int4" and len(entry.shape) == 2 and not entry.transposed


def add_nibbles(graph: Builder, packed: Packed, name: str) -> tuple[list[str], dict[str, int]]:
    """The inputs of MatMulNBits for a weight (N, K) for which `has_nibbles`, and its sizes as attributes.

    Each row is cut into blocks, the last one filled up. A block has a scale and a zero point, here those of the row.
    """
    entry = packed.manifest.tensors[name]
    rows, columns = entry.shape
    size = next((size for size in _BLOCKS if size <= columns), _BLOCKS[-1])
    blocks = -(-columns // size)
    codes = packed.tensors[f"{name}.{CODES}"]  # (rows * columns / 2,)
    if columns % size:
        padded = F.pad(unpack_bits(codes, entry.n_codes, 4).view(rows, columns), (0, -columns % size))
        codes = pack_bits(padded, 4)
    flat = graph.store(f"{name}.nibbles", codes)
    if columns % size == 0 and rows * columns % 8 == 0:  # as `add_codes` has them
        flat = graph.store(f"{name}.{CODES}.packed", codes.view(-1, 4))
    inputs = [graph.compute(f"{name}.blocks", "Reshape", flat, graph.numbers(rows, blocks, size // 2))]
    scale, zero_point = _affine(packed, name, 2)  # (1, 1) or (rows, 1)
    for key, tensor, count in (("scale", scale, blocks), ("zeros", zero_point.byte() * 17, -(-blocks // 2))):
        stored = graph.store(f"{name}.{key}", tensor)
        inputs.append(graph.compute(f"{name}.{key}.blocks", "Expand", stored, graph.numbers(rows, count)))
    return inputs, {"N": rows, "K": columns, "block_size": size}


def _add_dense(graph: Builder, name: str, tensor: Tensor) -> str:
    if tensor.dtype in _PLAIN:
        return graph.store(name, tensor)
    half = tensor if tensor.dtype == torch.float16 else tensor.float()  # numpy has no bfloat16
    return graph.cast(name, graph.store(f"{name}.stored", half))


def _add_blocks(graph: Builder, output: str, codes: str, centroids: str, shape: str) -> str:
    """The tensor `output` of this shape, a centroid (of K, d) for each code."""
    numbers = graph.cast(f"{output}.numbers", codes, "INT32")
    return graph.compute(output, "Reshape", graph.compute(f"{output}.each", "Gather", centroids, numbers), shape)


def _stored_centroids(graph: Builder, packed: Packed, name: str, entry: QuantizedTensor) -> str:
    """The centroids (K, d) of the tensor `name` as they are stored: float16, or int8."""
    owner = entry.codebook or name
    stored = packed.tensors[f"{owner}.{CENTROIDS}"]
    return graph.store(f"{owner}.{CENTROIDS}", stored if entry.centroid_bits == 16 else _signed(stored))


def _centroids(graph: Builder, packed: Packed, name: str, entry: QuantizedTensor) -> str:
    """The centroids (K, d) of the tensor `name` in float32."""
    stored, owner = _stored_centroids(graph, packed, name, entry), entry.codebook or name
    decoded = f"{stored}.float32"
    if decoded in graph:
        return decoded
    if entry.centroid_bits == 16:
        return graph.cast(decoded, stored)
    scale, zero_point = _affine(packed, owner, 2)
    return _decode(
        graph, decoded, stored, graph.store(f"{owner}.scale", scale), graph.store(f"{owner}.zero", zero_point)
    )


def _pq_codes(graph: Builder, packed: Packed, name: str, entry: QuantizedTensor) -> str:
    shape = entry.shape[0], entry.n_codes // entry.shape[0]
    return _once(graph, f"{name}.{CODES}", packed, entry, shape)


def _int_codes(graph: Builder, packed: Packed, name: str, entry: QuantizedTensor) -> str:
    """Codes of the weight's shape: signed of 8 bits, else unsigned."""
    if entry.code_bits < 8:
        return _once(graph, f"{name}.{CODES}", packed, entry, entry.shape)
    return graph.store(f"{name}.{CODES}", _signed(packed.tensors[f"{name}.{CODES}"].view(entry.shape)))


def _once(graph: Builder, name: str, packed: Packed, entry: QuantizedTensor, shape: tuple[int, ...]) -> str:
    return name if name in graph else add_codes(graph, name, packed.tensors[name], entry.code_bits, shape)


def _signed(numbers: Tensor) -> Tensor:
    """q - 128 as int8, for q (...) uint8."""
    return (numbers ^ 128).view(torch.int8)


def _affine(packed: Packed, name: str, dims: int) -> tuple[Tensor, Tensor]:
    """Scales and zero points of the codes that `_int_codes` gives, (C, 1, …) of `dims` dimensions, float32."""
    scale, zero_point = packed.tensors[f"{name}.{AFFINE}"].view(2, -1, *[1] * (dims - 1))
    entry = packed.manifest.tensors[name]
    signed = entry.scheme == "pq" or entry.code_bits == 8
    return scale, zero_point - 128 if signed else zero_point


def _decode(graph: Builder, output: str, codes: str, scale: str, zero_point: str) -> str:
    """(q - z) s, of the shape of the codes."""
    moved = graph.compute(f"{output}.moved", "Sub", graph.cast(f"{output}.float", codes), zero_point)
    return graph.compute(output, "Mul", moved, scale)
