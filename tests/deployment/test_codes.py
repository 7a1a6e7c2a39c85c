"""Codes of every number of bits, unpacked by the operators of a graph."""

import pytest
import torch
from exported import runtime

from fairseq_quant_noise.deployment.builder import Builder
from fairseq_quant_noise.deployment.codes import add_codes
from fairseq_quant_noise.utils.bits import code_dtype, pack_bits

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (16, 8), (5, 3, 2)], ids=str)
@pytest.mark.parametrize("bits", range(1, 13))
def test_codes_are_those_that_were_packed(bits, shape):
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, shape, generator=generator, dtype=code_dtype(2**bits))
    graph = Builder()
    add_codes(graph, "codes", pack_bits(codes, bits), bits, shape)
    graph.compute("out", "Identity", "codes")
    out = onnx.helper.make_tensor_value_info(
        "out", onnx.TensorProto.UINT8 if bits <= 8 else onnx.TensorProto.UINT32, shape
    )
    made = onnx.helper.make_graph(graph.nodes, "codes", [], [out], graph.initializers)
    opset = onnx.helper.make_opsetid("", 18)
    (found,) = runtime(onnx.helper.make_model(made, ir_version=8, opset_imports=[opset]).SerializeToString()).run(
        None, {}
    )
    assert found.tolist() == codes.tolist()
    stored = sum(len(i.raw_data) for i in graph.initializers if i.name.startswith("codes"))
    assert stored <= len(pack_bits(codes, bits)) + bits - 1
