"""Quantized networks as one graph: torch.compile, torch.export, and the operators that such a graph calls."""

import pytest
import torch
from torch import nn
from toys import python

from fairseq_quant_noise import load, quantize_, save
from fairseq_quant_noise.kernels import cpu, operators

PLANS = {
    "pq": {"stages": [{"match": ".*", "block_size": 8}]},
    "int8": {"stages": [{"match": ".*", "scheme": "int8", "range": "channel"}]},
    "pq + int8": {"stages": [{"match": ".*", "block_size": 8}], "centroids": {"dtype": "int8"}},
}
OPERATORS = {"pq": "linear", "int8": "linear_of_codes", "pq + int8": "linear_of_centroids"}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).eval()


@pytest.fixture(params=PLANS)
def packed(request, tmp_path):
    """(name of the plan, a network of its packed file, input)."""
    model = quantize_(network(), PLANS[request.param])
    save(model, tmp_path / "m.safetensors")
    generator = torch.Generator().manual_seed(1)
    return (
        request.param,
        load(tmp_path / "m.safetensors", into=network()),
        torch.randint(50, (3, 8), generator=generator),
    )


def test_compile_takes_the_network_whole(packed):
    _, model, x = packed
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))


@pytest.mark.parametrize("strict", [True, False])
def test_export_gives_a_graph_of_products_with_codes_for_any_batch(packed, strict):
    name, model, x = packed
    with torch.no_grad():
        exported = torch.export.export(model, (x,), strict=strict, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        assert torch.equal(exported.module()(x[:2]), model(x[:2]))
    called = [str(node.target) for node in exported.graph.nodes if "fairseq_quant_noise" in str(node.target)]
    assert called == [f"fairseq_quant_noise.{OPERATORS[name]}.default"] * 2


@pytest.mark.parametrize("plan", PLANS)
def test_export_takes_a_network_that_still_trains(plan):
    model, x = quantize_(network(), PLANS[plan]).eval(), torch.arange(8)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(
            torch.export.export(model, (x,)).module()(x), expected
        )  # small weights sum otherwise
        assert torch.equal(model(x), expected)  # nothing of the graph is left in it


def test_functional_call_finds_quantized_weights(packed):
    _, model, x = packed
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        assert torch.equal(torch.func.functional_call(model, state, (x,)), model(x))


def test_compile_after_a_call_sees_centroids_that_change():
    model, x = quantize_(network(), PLANS["pq"]), torch.arange(8)
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        before = compiled(x)
        model[3]._modules["weight"].centroids.mul_(2)
        assert (compiled(x) - before).abs().max() > 0.01
        torch.testing.assert_close(compiled(x), model(x))  # a graph sums a few rows otherwise


@pytest.mark.parametrize("bias", [torch.ones(24), None], ids=["bias", "none"])
def test_the_operators_keep_torchs_contract(bias):
    x, codes = torch.randn(2, 3, 16), torch.randint(256, (2, 24), dtype=torch.uint8)
    affine, grid = torch.tensor([[0.1], [3.0]]), torch.tensor([0.05, 128.0])
    centroids = torch.randint(256, (256, 8), dtype=torch.uint8)
    torch.library.opcheck(operators.linear, (x, codes, torch.randn(256, 8), bias))
    torch.library.opcheck(operators.linear_of_centroids, (x, codes, centroids, affine, bias, grid))
    rows = torch.randint(256, (24, 16), dtype=torch.uint8)
    torch.library.opcheck(operators.linear_of_codes, (x, rows, affine, bias, None))


def test_the_package_does_not_wait_for_torchs_compiler():
    """It takes almost as long to import as torch itself."""
    ran = python("-c", "import sys, fairseq_quant_noise; print('torch._dynamo' in sys.modules)")
    assert ran.stdout == "False\n", ran.stderr


def test_a_graph_without_compiled_kernels_has_products_in_fp32(packed, monkeypatch):
    name, model, x = packed
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        compiled(x)
        monkeypatch.setattr(cpu, "library", lambda: None)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-6)
