"""Codes of every number of bits, unpacked by the operators of a graph."""

import pytest
import torch
from exported import runtime

from fairseq_quant_noise.deployment.builder import Builder
from fairseq_quant_noise.deployment.codes import add_codes, add_rows_of_codes
from fairseq_quant_noise.utils.bits import code_dtype, pack_bits

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


def computed(graph, name, bits):
    """What onnxruntime finds for a tensor of codes."""
    graph.compute("out", "Identity", name)
    kind = onnx.TensorProto.UINT8 if bits <= 8 else onnx.TensorProto.UINT32
    out = onnx.helper.make_tensor_value_info("out", kind, None)
    made = onnx.helper.make_graph(graph.nodes, "codes", [], [out], graph.initializers)
    opset = onnx.helper.make_opsetid("", 18)
    model = onnx.helper.make_model(made, ir_version=8, opset_imports=[opset])
    return runtime(model.SerializeToString()).run(None, {})[0]


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (16, 8), (5, 3, 2)], ids=str)
@pytest.mark.parametrize("bits", range(1, 13))
def test_codes_are_those_that_were_packed(bits, shape):
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, shape, generator=generator, dtype=code_dtype(2**bits))
    graph = Builder()
    add_codes(graph, "codes", pack_bits(codes, bits), bits, shape)
    assert computed(graph, "codes", bits).tolist() == codes.tolist()
    stored = sum(len(i.raw_data) for i in graph.initializers if i.name.startswith("codes"))
    assert stored <= len(pack_bits(codes, bits)) + bits - 1


@pytest.mark.parametrize("columns", [16, 5], ids=["whole bytes", "parts of bytes"])
@pytest.mark.parametrize("bits", range(1, 13))
def test_rows_are_those_of_all_codes_and_come_from_packed_ones(bits, columns):
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (9, columns), generator=generator, dtype=code_dtype(2**bits))
    graph, numbers = Builder(), torch.tensor([[8, 0, 3], [3, 1, 7]])
    add_rows_of_codes(graph, "codes", pack_bits(codes, bits), bits, (9, columns), graph.store("of", numbers), "rows")
    assert computed(graph, "rows", bits).tolist() == codes[numbers].tolist()
    looked_up = next(node.input[0] for node in graph.nodes if node.input[-1] == "of")
    assert looked_up == ("codes" if bits == 8 or columns == 5 else "codes.rows")
