"""Fill a traced graph: its weights become what a packed file holds, and so do the products by them.

    Gather of a weight in codes     rows of codes, decoded after they are looked up
    MatMul by a weight in integers  of `products`:
        float   by the decoded weight
        int8    in whole numbers. Where the file rounds the input: DequantizeLinear of both sides, which says the same
                and which onnxruntime computes in whole numbers. Where it rounds none: DynamicQuantizeLinear and
                MatMulInteger
        int4    as int8, but by an int4 weight com.microsoft::MatMulNBits, which keeps the codes packed

All else reads the decoded weight. In a file that rounds inputs, a product whose input it does not round stays in float,
as it does in torch.
"""

from collections.abc import Iterable
from typing import Any

from ..artifact import Packed
from .builder import Builder
from .libraries import import_onnx
from .tracing import PREFIX
from .weights import Matrix, add_integers, add_nibbles, add_rows, add_weight, has_integers, has_nibbles

FLOAT, INT8, INT4 = PRODUCTS = ("float", "int8", "int4")
MICROSOFT = "com.microsoft"  # the domain of onnxruntime's own operators
_INPUTS_IN_8_BITS, _INPUTS_IN_FLOAT = 4, 0  # accuracy levels of MatMulNBits


class Filler:
    """Writes the nodes of a traced graph with the weights of a file.

    Args:
        packed: the file's content, of `weights.KNOWN` schemes.
        products: one of PRODUCTS.
    """

    def __init__(self, packed: Packed, products: str) -> None:
        self.graph = Builder()
        self._packed, self._products = packed, products
        self._rounds = bool(packed.manifest.inputs)
        self._turned: dict[str, str] = {}  # the weight (O, I) behind a tensor (I, O)
        self._rounded: set[str] = set()  # the outputs of DequantizeLinear

    def add(self, node: Any) -> None:
        """A node of the traced graph."""
        if node.op_type == "Transpose" and self._weight(node.input[0]):
            self._turned[node.output[0]] = node.input[0]
        if node.op_type == "DequantizeLinear":
            self._rounded.add(node.output[0])
        if node.op_type == "Gather" and self._is_row_lookup(node):
            add_rows(self.graph, self._packed, self._weight(node.input[0]), node.input[1], node.output[0])
        elif (weight := self._factor(node)) is None or not self._multiply(node, weight):
            node.input[:] = [self._named(name) for name in node.input]
            self.graph.nodes.append(node)

    def _weight(self, name: str) -> str:
        """The name in the file of the weight that is the graph's tensor `name`; "" if it is none."""
        own = name.removeprefix(PREFIX) if name.startswith(PREFIX) else ""
        return self._packed.ties.get(own, own)

    def _named(self, name: str) -> str:
        weight = self._weight(name)
        return add_weight(self.graph, self._packed, weight) if weight else name

    def _is_row_lookup(self, node: Any) -> bool:
        is_coded = self._weight(node.input[0]) in self._packed.manifest.tensors
        return is_coded and all(attribute.i == 0 for attribute in node.attribute if attribute.name == "axis")

    def _factor(self, node: Any) -> str | None:
        """The weight (O, I) of a product x W^T, by its name in the file."""
        found = ""
        if node.op_type == "MatMul":
            found = self._turned.get(node.input[1], "")
        elif node.op_type == "Gemm" and any(a.name == "transB" and a.i for a in node.attribute):
            found = node.input[1]
        return self._weight(found) or None

    def _multiply(self, node: Any, weight: str) -> bool:
        """Write the product of a node in whole numbers, if its weight has them and its input may be rounded."""
        given, output = node.input[0], node.output[0]
        if self._products == FLOAT or self._rounds != (given in self._rounded):
            return False
        product = f"{output}.product" if node.op_type == "Gemm" else output
        if self._products == INT4 and has_nibbles(self._packed, weight):
            self._multiply_nibbles(given, weight, product)
        elif has_integers(self._packed, weight):
            self._multiply_integers(given, weight, product)
        else:
            return False
        if node.op_type == "Gemm":
            bias = [self._named(name) for name in node.input[2:]]
            self.graph.compute(output, "Add" if bias else "Identity", product, *bias)
        return True

    def _multiply_nibbles(self, given: str, weight: str, output: str) -> None:
        inputs, sizes = add_nibbles(self.graph, self._packed, weight)
        level = _INPUTS_IN_FLOAT if self._rounds else _INPUTS_IN_8_BITS
        self.graph.compute(
            output, "MatMulNBits", given, *inputs, domain=MICROSOFT, bits=4, accuracy_level=level, **sizes
        )

    def _multiply_integers(self, given: str, weight: str, output: str) -> None:
        matrix = add_integers(self.graph, self._packed, weight)
        if self._rounds:
            self.graph.compute(output, "MatMul", given, self._dequantized(matrix))
            return
        graph = self.graph
        numbers, scale, zero_point = (f"{given}.{part}" for part in ("numbers", "scale", "zero_point"))
        if numbers not in graph:  # of the products by several weights, once
            graph.compute((numbers, scale, zero_point), "DynamicQuantizeLinear", given)
        sums = graph.compute(f"{output}.sums", "MatMulInteger", numbers, matrix.codes, zero_point, matrix.zero_point)
        scales = graph.compute(f"{output}.scales", "Mul", scale, matrix.scale)
        graph.compute(output, "Mul", graph.cast(f"{output}.float", sums), scales)

    def _dequantized(self, matrix: Matrix) -> str:
        name = f"{matrix.codes}.dequantized"
        if name in self.graph:
            return name
        return self.graph.compute(name, "DequantizeLinear", matrix.codes, matrix.scale, matrix.zero_point, axis=1)


def without_unused(graph: Builder, outputs: Iterable[str]) -> tuple[list[Any], list[Any]]:
    """The nodes and initializers of a graph that its outputs depend on, in their order."""
    needed, nodes = set(outputs), []
    for node in reversed(graph.nodes):
        if needed & {*node.output}:
            nodes.append(node)
            needed.update(node.input)
    return nodes[::-1], [initializer for initializer in graph.initializers if initializer.name in needed]


def domains(nodes: Iterable[Any]) -> list[Any]:
    """The sets of operators besides ONNX's own that the nodes are of."""
    names = {node.domain for node in nodes} - {""}
    return [import_onnx().helper.make_opsetid(name, 1) for name in sorted(names)]
