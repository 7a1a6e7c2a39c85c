"""The tensors of a packed file in an ONNX graph: initializers, and the operators that make dense weights of them.

    dense   NAME, or NAME.stored -> Cast
    pq      NAME.codes (rows, blocks a row) -> Cast -> Gather from NAME.centroids (K, d) -> Reshape
            centroids: fp16 -> Cast, or 8-bit codes as intN; once for all users of a shared codebook
            with row scales: -> Mul NAME.scales (rows, 1, …), fp16 -> Cast
    intN    NAME.codes, of the weight's shape -> Cast -> Sub NAME.zero_point -> Mul NAME.scale

Each makes the tensor NAME, floats as float32. Codes of less than 8 bits are unpacked first (`codes.py`). A runtime
computes all of this once, when it loads the model. DequantizeLinear would say the same of intN, but onnxruntime takes
it as leave to round the inputs of the product to 8 bits, and scores change in the second digit.
"""

import torch
from torch import Tensor

from ..artifact import Packed
from ..layers.parts import AFFINE, CENTROIDS, CODES, SCALES
from ..layers.registry import QuantizedTensor
from ..scalar import SCHEMES
from .builder import Builder
from .codes import add_codes

#: The schemes of packed files that have a form in ONNX.
KNOWN = ("pq", *SCHEMES)
_PLAIN = (torch.float32, torch.int64, torch.int32, torch.bool)  # stored as the graph reads them


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
        return _add_pq(graph, packed, name, entry)
    codes = _codes(graph, packed, name, entry, entry.shape)
    return _add_decoded(graph, packed, name, codes, name, len(entry.shape))


def _add_dense(graph: Builder, name: str, tensor: Tensor) -> str:
    if tensor.dtype in _PLAIN:
        return graph.store(name, tensor)
    half = tensor if tensor.dtype == torch.float16 else tensor.float()  # numpy has no bfloat16
    return graph.cast(name, graph.store(f"{name}.stored", half))


def _add_pq(graph: Builder, packed: Packed, name: str, entry: QuantizedTensor) -> str:
    codes = _codes(graph, packed, name, entry, (entry.shape[0], entry.n_codes // entry.shape[0]))
    numbers = graph.cast(f"{codes}.numbers", codes, "INT32")
    centroids = _centroids(graph, packed, entry.codebook or name, entry.centroid_bits)
    blocks = graph.compute(f"{name}.blocks", "Gather", centroids, numbers)  # (rows, blocks a row, d)
    if not entry.row_scales:
        return graph.compute(name, "Reshape", blocks, graph.numbers(*entry.shape))
    stored = packed.tensors[f"{name}.{SCALES}"].view(-1, *[1] * (len(entry.shape) - 1))
    scales = graph.cast(f"{name}.{SCALES}.float32", graph.store(f"{name}.{SCALES}", stored))
    unscaled = graph.compute(f"{name}.unscaled", "Reshape", blocks, graph.numbers(*entry.shape))
    return graph.compute(name, "Mul", unscaled, scales)


def _centroids(graph: Builder, packed: Packed, owner: str, bits: int) -> str:
    """The centroids (K, d) of the tensor `owner` in float32."""
    stored = graph.store(f"{owner}.{CENTROIDS}", packed.tensors[f"{owner}.{CENTROIDS}"])
    name = f"{stored}.float32"
    if name in graph:
        return name
    return graph.cast(name, stored) if bits == 16 else _add_decoded(graph, packed, owner, stored, name, 2)


def _codes(graph: Builder, packed: Packed, name: str, entry: QuantizedTensor, shape: tuple[int, ...]) -> str:
    return add_codes(graph, f"{name}.{CODES}", packed.tensors[f"{name}.{CODES}"], entry.code_bits, shape)


def _add_decoded(graph: Builder, packed: Packed, name: str, codes: str, output: str, dims: int) -> str:
    """(q - z) s of codes with so many dimensions, by the scales and zero points (2, C) of the tensor `name`."""
    scale, zero_point = packed.tensors[f"{name}.{AFFINE}"].view(2, -1, *[1] * (dims - 1))
    numbers = graph.cast(f"{codes}.numbers", codes)
    moved = graph.compute(f"{codes}.moved", "Sub", numbers, graph.store(f"{name}.zero_point", zero_point))
    return graph.compute(output, "Mul", moved, graph.store(f"{name}.scale", scale))
