"""Products in 8 bits: every processor's form against the formula, and the modules that use them."""

import copy
import ctypes
import platform
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared_products import assert_prepared_products
from torch import nn
from whole_layers import SCHEMES, assert_same_layers, both_ways

from fairseq_quant_noise import kernels, load, quantize_, save
from fairseq_quant_noise.kernels import cpu, reference
from fairseq_quant_noise.layers.inputs import GRID
from fairseq_quant_noise.layers.quantized import quantized_weights
from fairseq_quant_noise.scalar import Affine, fake_quantize

#: Compiled for these, the kernels take a path each: AMX, VNNI of 512 and of 256 bits, AVX2, plain C++.
PROCESSORS = {
    "sapphirerapids": {"amx_int8", "avx512_vnni", "avx512vbmi"},
    "icelake-server": {"avx512_vnni", "avx512vbmi"},
    "cascadelake": {"avx512_vnni"},
    "alderlake": {"avx_vnni"},
    "haswell": {"avx2", "fma"},
    "x86-64": set(),
}


def case(n, inner, rows, channels=True, bias=True, seed=0):
    """x (n, inner), codes (rows, inner), affine, bias."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, inner, generator=generator)
    codes = torch.randint(256, (rows, inner), generator=generator, dtype=torch.uint8)
    count = rows if channels else 1
    scales = torch.rand(count, generator=generator) * 0.02 + 0.001
    zeros = torch.randint(256, (count,), generator=generator).float()
    return x, codes, torch.stack([scales, zeros]), torch.randn(rows, generator=generator) if bias else None


def centroid_case(n, blocks, d, rows, bias=True, seed=0):
    """x (n, blocks * d), codes (blocks, rows), centroids (256, d), affine, bias."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(256, (blocks, rows), generator=generator, dtype=torch.uint8)
    centroids = torch.randint(256, (256, d), generator=generator, dtype=torch.uint8)
    added = torch.randn(rows, generator=generator) if bias else None
    return torch.randn(n, blocks * d, generator=generator), codes, centroids, torch.tensor([[0.013], [121.0]]), added


def assert_same_products(found, expected):
    """Equal but for the order of a few float operations."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6 * float(expected.abs().max()) + 1e-9)


@given(
    n=st.integers(1, 70),
    inner=st.integers(1, 200),
    rows=st.integers(1, 150),
    channels=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_codes_of_any_shape_multiply_as_the_formula_says(n, inner, rows, channels, bias, seed):
    arguments = case(n, inner, rows, channels, bias, seed)
    assert_same_products(cpu.linear_of_codes(*arguments), reference.linear_of_codes(*arguments))


@given(
    n=st.integers(1, 40),
    blocks=st.integers(1, 40),
    d=st.sampled_from([1, 2, 3, 4, 8, 9, 16]),
    rows=st.integers(1, 150),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_centroids_of_any_shape_multiply_as_the_formula_says(n, blocks, d, rows, seed):
    arguments = centroid_case(n, blocks, d, rows, bias=bool(seed % 2), seed=seed)
    assert_same_products(cpu.linear_of_centroids(*arguments), reference.linear_of_centroids(*arguments))


def test_a_row_is_rounded_on_its_own_range_as_a_tensor_is():
    x = torch.randn(3, 64) * torch.tensor([[1.0], [100.0], [0.01]]) + torch.tensor([[0.0], [50.0], [0.0]])
    identity = torch.eye(64).to(torch.uint8), torch.tensor([[1.0], [0.0]])
    for row, found in zip(x, cpu.linear_of_codes(x, *identity), strict=True):
        low, high = row.aminmax()
        expected = fake_quantize(row, Affine.of_range(low.reshape(1), high.reshape(1), 8))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", [cpu, reference], ids=["cpu", "reference"])
def test_a_grid_that_is_given_is_kept_and_what_is_beyond_it_is_cut(form):
    identity = torch.eye(4).to(torch.uint8), torch.tensor([[1.0], [0.0]])
    x, grid = torch.tensor([[-9.0, -0.26, 0.24, 300.0]]), torch.tensor([0.5, 2.0])
    assert form.linear_of_codes(x, *identity, None, grid).tolist() == [[-1.0, -0.5, 0.0, 126.5]]


@pytest.mark.parametrize("form", [cpu, reference], ids=["cpu", "reference"])
def test_a_row_that_is_not_finite_spoils_itself_alone(form):
    x, codes, affine, bias = case(5, 70, 30)
    expected = form.linear_of_codes(x, codes, affine, bias)
    x[1, 3], x[3, 69] = torch.nan, torch.inf
    found = form.linear_of_codes(x, codes, affine, bias)
    assert found[[1, 3]].isnan().all()
    assert torch.equal(found[[0, 2, 4]], expected[[0, 2, 4]])
    found = form.linear_of_codes(x, codes, affine, bias, torch.tensor([0.02, 128.0]))
    assert found.isnan().all(1).tolist() == [False, True, False, False, False]  # infinity is cut


def test_rows_of_zeros_give_the_bias():
    _, codes, affine, bias = case(1, 70, 30)
    assert torch.equal(cpu.linear_of_codes(torch.zeros(2, 70), codes, affine, bias), bias.expand(2, -1))


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_threads_change_nothing(threads):
    arguments, blocks = case(300, 130, 200), centroid_case(300, 20, 8, 200)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = cpu.linear_of_codes(*arguments), cpu.linear_of_centroids(*blocks)
    try:
        torch.set_num_threads(threads)
        assert torch.equal(cpu.linear_of_codes(*arguments), alone[0])
        assert torch.equal(cpu.linear_of_centroids(*blocks), alone[1])
    finally:
        torch.set_num_threads(before)


def processors():
    """Those whose instructions this machine has; on another kind of machine its own alone."""
    if platform.machine() != "x86_64":
        return ["native"]
    flags = set(Path("/proc/cpuinfo").read_text().partition("\nflags")[2].partition("\n")[0].split())
    return [name for name, needed in PROCESSORS.items() if needed <= flags]


@pytest.mark.parametrize("processor", processors())
def test_each_form_of_a_processor_computes_the_same(processor, tmp_path, monkeypatch):
    library = tmp_path / "kernels.so"
    sources = sorted((Path(kernels.__file__).parent / "native").glob("*.cpp"))
    command = ["c++", "-O2", f"-march={processor}", "-std=c++17", "-fopenmp-simd", "-shared", "-fPIC", "-w"]
    subprocess.run([*command, "-o", str(library), *map(str, sources)], check=True, timeout=200)
    compiled = ctypes.CDLL(str(library))
    cpu.declare(compiled)
    monkeypatch.setattr(cpu, "library", lambda: compiled)
    whole_tiles = ((1, 64, 64), (5, 128, 64), (16, 192, 128), (33, 64, 192), (48, 256, 64), (70, 128, 128))
    for n, inner, rows in (*whole_tiles, (4, 70, 50), (7, 5, 3), (33, 130, 100), (100, 257, 129)):
        arguments = case(n, inner, rows)
        assert_same_products(cpu.linear_of_codes(*arguments), reference.linear_of_codes(*arguments))
    for n, blocks, d, rows in ((1, 9, 8, 70), (3, 10, 4, 64), (40, 7, 9, 130), (17, 33, 16, 20)):
        arguments = centroid_case(n, blocks, d, rows)
        assert_same_products(cpu.linear_of_centroids(*arguments), reference.linear_of_centroids(*arguments))
    for n, blocks, d, rows in ((3, 16, 4, 68), (6, 4, 8, 100), (7, 2, 16, 4), (12, 6, 8, 64), (5, 3, 8, 64)):
        x, codes = torch.randn(n, blocks * d), torch.randint(256, (blocks, rows), dtype=torch.uint8)
        arguments = x, codes, torch.randn(256, d), torch.randn(rows)
        torch.testing.assert_close(cpu.linear(*arguments), reference.linear(*arguments), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert_prepared_products()
        for scheme in SCHEMES:
            for _, whole, parts in both_ways(scheme):
                assert_same_layers(whole, parts)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(30, 32), nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 8))


@pytest.fixture(params=SCHEMES)
def from_file(request, tmp_path):
    """Makes a network of a packed file, with the plan's other settings."""

    def make(**plan):
        model = network()
        quantize_(model, SCHEMES[request.param] | plan, calibration=[torch.arange(30)] if plan else None)
        save(model, tmp_path / "m.safetensors")
        return load(tmp_path / "m.safetensors", into=network()).eval()

    return make


def decoded(model):
    """The same network with dense weights and fp32 products."""
    dense = network()
    dense[0].weight.data, dense[1].weight.data, dense[3].weight.data = (
        weight.decode().detach().clone() for weight in quantized_weights(model).values()
    )
    dense[1].bias, dense[3].bias = model[1].bias, model[3].bias
    return dense.eval()


@pytest.mark.upstream(36)
def test_a_file_of_integers_multiplies_integers(from_file, monkeypatch):
    model, called = from_file(), []
    forms = {name: getattr(cpu, name) for name in ("linear_of_codes", "linear_of_centroids")}
    for name, form in forms.items():
        monkeypatch.setattr(cpu, name, lambda *args, form=form: called.append(form) or form(*args))
    with torch.no_grad():
        model(torch.arange(30))
    assert len(called) == 2


def test_inputs_in_8_bits_move_the_output_a_little(from_file):
    model = from_file()
    with torch.no_grad():
        found, expected = model(torch.arange(30)), decoded(model)(torch.arange(30))
    error = float((found - expected).norm() / expected.norm())
    assert 1e-5 < error < 0.02


def test_without_the_kernels_products_are_in_fp32(from_file, monkeypatch):
    model = from_file()
    monkeypatch.setattr(cpu, "library", lambda: None)
    with torch.no_grad():
        torch.testing.assert_close(model(torch.arange(30)), decoded(model)(torch.arange(30)), rtol=1e-5, atol=1e-6)


def test_calibrated_inputs_agree_with_fake_quantization(from_file):
    model = from_file(activations={"bits": 8})
    dense = decoded(model)
    with torch.no_grad():
        x, inputs = dense[0](torch.arange(30)), [model[1].input_quantizer, model[3].input_quantizer]
        hidden = dense[1](inputs[0](x))
        expected = dense[3](inputs[1](F.gelu(hidden)))
        torch.testing.assert_close(model(torch.arange(30)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("calibrated", [True, False])
def test_the_product_alone_rounds_calibrated_inputs_and_follows_their_range(from_file, calibrated, monkeypatch):
    layer, x = from_file(activations={"bits": 8})[1], torch.randn(5, 32)
    quantizer = layer.input_quantizer
    if not calibrated:
        quantizer.reset()
    for _ in range(2):
        with torch.no_grad():
            expected = F.linear(quantizer(x), layer.weight, layer.bias)
            with monkeypatch.context() as patch:
                patch.setattr("fairseq_quant_noise.layers.inputs.fake_quantize", None)
                torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
        quantizer.range.mul_(3)


def test_an_input_of_several_layers_is_rounded_for_each_by_its_own_range(from_file):
    model, x = from_file(activations={"bits": 8}), torch.randn(5, 32)
    first, second = model[1], copy.deepcopy(model[1])
    second.input_quantizer.range.mul_(0.3)
    with torch.no_grad():
        kept, expected = x.clone(), F.linear(second.input_quantizer(x), second.weight, second.bias)
        first(x)
        torch.testing.assert_close(second(x), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(x, kept)
    assert not hasattr(x, GRID)


def test_an_embedding_in_codes_decodes_the_rows_that_it_looks_up(from_file, monkeypatch):
    model, ids = from_file(), torch.tensor([[3, 29], [0, 3]])
    (weight, *_) = quantized_weights(model).values()
    expected = weight.decode()[ids]
    monkeypatch.setattr(type(weight), "decode", lambda self: pytest.fail("the whole weight was decoded"))
    with torch.no_grad():
        torch.testing.assert_close(model[0](ids), expected, rtol=0, atol=0)
