"""Make an ONNX model of a packed file: the traced graph of its network, and the file's tensors in the place of weights.

Scores are those of the decoded weights, up to the order of sums. The model takes about the bytes of the packed file,
since its codes are decoded by operators of the graph.
"""

from pathlib import Path
from typing import Any

from .._version import __version__
from ..artifact import Packed
from ..artifact.network import check_network
from ..errors import UserError
from .libraries import import_onnx
from .parts import part_of
from .products import FLOAT, PRODUCTS, Filler, domains, without_unused
from .tracing import PREFIX, trace
from .weights import KNOWN

_LARGEST = 2_000_000_000  # bytes of weights; a protobuf message ends at 2 GiB


def onnx_model(path: str | Path, packed: Packed, part: str | None = None, products: str = FLOAT) -> bytes:
    """The bytes of an ONNX model of the network of a packed file.

    Args:
        path: of the file, for messages.
        packed: its content.
        part: which part of the network, see `parts.part_of`.
        products: how weights in integers are multiplied, one of `products.PRODUCTS`.

    Raises:
        UserError: the network, its part or a tensor cannot be exported; there is no such form of products; it is too
            large for a model; or onnx is not installed.
        DamagedFileError: the file's configuration describes no network.
    """
    if products not in PRODUCTS:
        raise UserError(f"products {products!r} are none of {', '.join(PRODUCTS)}; give one of them")
    _check(path, packed)
    network = check_network(path, packed)
    try:
        chosen = part_of(network, part)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    onnx = import_onnx()
    network = network.to_empty(device="cpu").eval()
    traced = onnx.load_model_from_string(trace(network, chosen, packed.manifest.inputs, in_codes=products != FLOAT))
    content: bytes = _with_weights(traced, packed, products).SerializeToString(deterministic=True)
    return content


def _check(path: str | Path, packed: Packed) -> None:
    """Refuse what no model can be made of, whatever the network. Raises UserError."""
    entries = packed.manifest.tensors
    if "architecture" not in packed.manifest.model:
        raise UserError(f"{path}: holds a network of your own; only files of fairseq's models can be exported to ONNX")
    for name, entry in entries.items():
        if entry.scheme not in KNOWN:
            raise UserError(f"{path}: {name}: scheme {entry.scheme} has no form in ONNX; give a file without it")
    weights = sum(map(packed.tensor_bytes, [*entries, *packed.dense_names]))
    if weights > _LARGEST:
        raise UserError(f"{path}: its {weights:,} bytes of weights do not fit an ONNX model of {_LARGEST:,} bytes")


def _with_weights(traced: Any, packed: Packed, products: str) -> Any:
    """The traced model with the file's tensors in the place of those inputs that are weights.

    What is computed on the way is numbered: the tracer's names would take a third of a small model's bytes.
    """
    graph, helper, filler = traced.graph, import_onnx().helper, Filler(packed, products)
    for node in graph.node:
        filler.add(node)
    nodes, initializers = without_unused(filler.graph, [output.name for output in graph.output])
    inputs = [given for given in graph.input if not given.name.startswith(PREFIX)]
    names = {name: name for name in ["", *(named.name for named in (*inputs, *graph.output, *initializers))]}
    for node in nodes:  # "": an input that is left out
        node.name = ""
        for of_node in (node.input, node.output):
            of_node[:] = [names.setdefault(name, str(len(names))) for name in of_node]
    filled = helper.make_graph(nodes, "network", inputs, graph.output, initializers)
    return helper.make_model(
        filled,
        ir_version=traced.ir_version,
        opset_imports=[*traced.opset_import, *domains(nodes)],
        producer_name="fairseq_quant_noise",
        producer_version=__version__,
    )
