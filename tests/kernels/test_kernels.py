"""The kernels, each form against the same formula, and where the modules use them."""

import copy
import logging
import os
import platform
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from toys import python

from fairseq_quant_noise import kernels, quantize_
from fairseq_quant_noise.kernels import cpu, reference
from fairseq_quant_noise.layers import adopt_quantized
from fairseq_quant_noise.layers.pq import PQWeight
from fairseq_quant_noise.utils.bits import code_dtype
from fairseq_quant_noise.weights.access import intercept

FORMS = pytest.mark.parametrize("form", [reference, cpu], ids=["reference", "cpu"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def nearest(form, points, centroids):
    """As `kernels.nearest` calls a form."""
    return form.least(points, centroids.t() * -2, centroids.square().sum(1))


def test_the_compiled_form_is_there():
    """fairseq is built here, so there is a compiler."""
    assert cpu.library() is not None


@FORMS
@dtypes
@given(st.integers(1, 300), st.integers(1, 20), st.integers(1, 256), st.integers(0, 2**20))
@settings(max_examples=25, deadline=None)
def test_the_nearest_centroid_is_the_nearest(form, dtype, n, d, k, seed):
    points, centroids = random(n, d, seed=seed, dtype=dtype), random(k, d, seed=seed + 1, dtype=dtype)
    found = nearest(form, points, centroids)
    distances = torch.cdist(points.double(), centroids.double()).square()
    chosen = distances.gather(1, found[:, None])[:, 0]
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(chosen, distances.min(1).values, rtol=tolerance, atol=tolerance)


@dtypes
@given(st.integers(1, 300), st.integers(1, 20), st.integers(1, 256), st.integers(0, 2**20))
@settings(max_examples=25, deadline=None)
def test_the_nearest_centroid_by_weights_of_each_number(dtype, n, d, k, seed):
    points, centroids = random(n, d, seed=seed, dtype=dtype), random(k, d, seed=seed + 1, dtype=dtype)
    weights = random(n, d, seed=seed + 2, dtype=dtype).exp()
    found = kernels.nearest(points, centroids, weights)
    distances = (weights[:, None] * (points[:, None] - centroids).square()).sum(2).double()
    chosen = distances.gather(1, found[:, None])[:, 0]
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(chosen, distances.min(1).values, rtol=tolerance, atol=tolerance)


@FORMS
@dtypes
def test_of_equal_distances_the_first_counts(form, dtype):
    centroids = torch.tensor([[3.0], [1.0], [1.0], [-1.0]], dtype=dtype).repeat(8, 1)
    assert nearest(form, torch.tensor([[1.0], [0.0], [3.0], [-9.0]], dtype=dtype), centroids).tolist() == [1, 1, 0, 3]


@FORMS
def test_points_that_are_not_contiguous(form):
    points = random(8, 500).t()
    assert torch.equal(
        nearest(form, points, random(64, 8, seed=1)), nearest(form, points.contiguous(), random(64, 8, seed=1))
    )


def test_the_number_of_threads_changes_nothing():
    points, centroids = random(100_000, 8), random(256, 8, seed=1)
    codes = torch.randint(256, (128, 9001), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    narrow, x = codes[:, :40].contiguous(), random(2, 1024, seed=3)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results = [nearest(cpu, points, centroids), cpu.decode(codes, centroids)]
            found.append([*results, *(cpu.linear(x, laid_out, centroids) for laid_out in (codes, narrow))])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, three) for one, three in zip(*found, strict=True))


def test_work_is_split_among_the_threads_of_torch():
    assert cpu._team() is not None


@FORMS
@given(
    st.sampled_from([1, 2, 5, 17, 33]),
    st.integers(1, 9),
    st.sampled_from([1, 3, 64, 4200]),
    st.sampled_from([1, 4, 8]),
    st.sampled_from([1, 16, 200, 256, 257, 4096]),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_a_product_with_codes_is_that_with_the_decoded_weight(form, n, blocks, rows, d, k, with_bias):
    x, centroids = random(n, blocks * d), random(k, d, seed=1)
    codes = torch.randint(k, (blocks, rows), dtype=code_dtype(k), generator=torch.Generator().manual_seed(2))
    bias = random(rows, seed=3) if with_bias else None
    weight = centroids[codes.t().long()].reshape(rows, blocks * d)
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    found = form.linear(x, codes, centroids, bias)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max() + 1))
    assert form.linear(x.view(1, n, -1), codes, centroids, bias).shape == (1, n, rows)
    assert torch.equal(form.linear(x, codes.t().contiguous().t(), centroids, bias), found)  # codes of any strides


@FORMS
@pytest.mark.parametrize("k", [256, 1000])
@pytest.mark.parametrize("d", [4, 6, 8])
@pytest.mark.parametrize(("n", "rows"), [(1, 1000), (70, 1000), (70, 39), (64, 96)])
def test_a_large_weight_is_read_in_pieces(form, n, rows, d, k):
    """Of 600 numbers of a row at most, and of some hundred rows: neither has to fit."""
    x, centroids = random(n, 200 * d), random(k, d, seed=1)
    codes = torch.randint(k, (200, rows), dtype=code_dtype(k), generator=torch.Generator().manual_seed(2))
    weight, bias = centroids[codes.t().long()].reshape(rows, 200 * d), random(rows, seed=3)
    expected = F.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(form.linear(x, codes, centroids, bias).double(), expected, rtol=1e-5, atol=2e-4)


@FORMS
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -1e20, 0.0])
def test_numbers_that_have_no_common_scale(form, odd):
    """A NaN stays one, wherever it is; zeros, infinities and far larger numbers give what float32 gives."""
    x, centroids = random(1, 800), random(256, 8, seed=1)
    codes = torch.randint(256, (100, 300), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    for place in (slice(0, 1), slice(300, 301), slice(0, 800)):
        changed = x.clone()
        changed[:, place] = odd
        expected = F.linear(changed, centroids[codes.t().long()].reshape(300, 800))
        bound = 1e-5 * float(expected[expected.isfinite()].abs().max()) if expected.isfinite().any() else 0
        torch.testing.assert_close(
            form.linear(changed, codes, centroids), expected, rtol=1e-5, atol=bound, equal_nan=True
        )
    centroids[7] = odd
    expected = F.linear(x, centroids[codes.t().long()].reshape(300, 800))
    torch.testing.assert_close(form.linear(x, codes, centroids).isnan(), expected.isnan())


@pytest.mark.parametrize("outlier", [1.0, 100.0, 10_000.0])
def test_beside_an_outlier_other_numbers_keep_the_precision_that_float32_leaves_them(outlier):
    x, centroids = random(1, 1024), random(256, 8, seed=1)
    x[0, 5] = outlier
    codes = torch.randint(256, (128, 4096), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    weight = centroids[codes.t().long()].reshape(4096, 1024)
    expected = F.linear(x.double(), weight.double())
    errors = [(found.double() - expected).norm() for found in (cpu.linear(x, codes, centroids), F.linear(x, weight))]
    assert errors[0] < 6 * errors[1]


@pytest.mark.parametrize("processor", ["x86-64", "x86-64-v3", "skylake-avx512", "icelake-server"])
def test_every_processor_gets_the_same(processor, tmp_path):
    """The forms for processors that are older than this one, as far as this one runs them.

    Whole numbers, so that sums are exact and several centroids are nearest.
    """
    flags = {"x86-64": "sse2", "x86-64-v3": "avx2", "skylake-avx512": "avx512bw", "icelake-server": "avx512_vbmi2"}
    if platform.machine() != "x86_64" or flags[processor] not in Path("/proc/cpuinfo").read_text():
        pytest.skip(f"this processor does not run the instructions of {processor}")
    code = f"""
import torch
from fairseq_quant_noise.kernels import cpu, reference
cpu._FLAGS = (*cpu._FLAGS, "-march={processor}")
for d in (4, 6, 8):
    for n, rows in ((1, 700), (2, 70), (70, 700), (65, 39)):
        for k, dtype in ((256, torch.uint8), (999, torch.int32)):
            x, centroids = torch.randn(n, 100 * d), torch.randn(k, d)
            codes = torch.randint(k, (100, rows), dtype=dtype)
            found, expected = cpu.linear(x, codes, centroids), reference.linear(x.double(), codes, centroids.double())
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-4)
            assert torch.equal(cpu.decode(codes, centroids), reference.decode(codes, centroids))
for d in (2, 4, 8):
    for dtype in (torch.float32, torch.float64):
        points, slope, bias = (torch.randint(-3, 4, size).to(dtype) for size in ((900, d), (d, 100), (100,)))
        assert torch.equal(cpu.least(points, slope, bias), reference.least(points, slope, bias))
assert cpu.library() is not None
"""
    done = python("-c", code, env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)}, fresh=False)
    assert done.returncode == 0, done.stderr


@FORMS
@given(
    st.integers(1, 100),
    st.integers(1, 9),
    st.integers(1, 17),
    st.one_of(st.integers(1, 256), st.integers(257, 4096)),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_a_weight_comes_out_of_its_codes(form, rows, blocks, d, k, by_block):
    centroids = random(k, d)
    codes = torch.randint(k, (rows, blocks), dtype=code_dtype(k), generator=torch.Generator().manual_seed(2))
    laid_out = codes.t().contiguous().t() if by_block else codes
    assert torch.equal(form.decode(laid_out, centroids), centroids[codes.long()].view(rows, blocks * d))


def test_a_code_beyond_the_centroids_reads_zeros_and_no_memory():
    codes = torch.full((3, 2), 255, dtype=torch.uint8)
    assert not cpu.decode(codes, random(4, 8)).any()
    assert not cpu.linear(random(1, 16), codes.t().contiguous(), random(4, 8)).any()


def test_a_state_with_codes_beyond_its_centroids_is_refused():
    model = quantized(nn.Linear(32, 48))
    state = {**model.state_dict(), "0.weight.codes": torch.full((48, 8), 32, dtype=torch.uint8)}
    with pytest.raises(RuntimeError, match="0.weight.codes: a code beyond its 32 centroids"):
        model.load_state_dict(state)


def quantized(module):
    torch.manual_seed(0)
    return quantize_(nn.Sequential(module), {"stages": [{"match": "0", "block_size": 4, "n_centroids": 32}]}).eval()


@pytest.mark.upstream(11)
def test_a_quantized_linear_multiplies_by_codes_in_evaluation_only(monkeypatch):
    model, seen = quantized(nn.Linear(32, 48)), []

    def product(self, x, bias):
        if (found := kernels_product(self, x, bias)) is not None:
            seen.append(x.shape)
        return found

    monkeypatch.setattr(PQWeight, "product", product)
    few, many = random(2, 32), random(40, 32)
    with torch.no_grad():
        decoded = F.linear(few, model[0].weight, model[0].bias)
        torch.testing.assert_close(model(few), decoded, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(model(many), F.linear(many, model[0].weight, model[0].bias), rtol=1e-5, atol=1e-6)
        assert seen == [(2, 32), (40, 32)]
        model.train()(few)
    model.eval()(few).sum().backward()
    assert model[0]._modules["weight"].centroids.grad is not None
    assert seen == [(2, 32), (40, 32)]


kernels_product = PQWeight.product


@pytest.mark.parametrize("how", ["quantized", "loaded", "loaded without a copy", "moved"])
def test_codes_lie_as_the_kernel_reads_them_before_any_forward(how):
    source = quantized(nn.Linear(32, 48))
    before = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in source.state_dict().items()}
    if how == "quantized":
        model = source
    else:
        model = nn.Sequential(nn.Linear(32, 48)).eval()
        adopt_quantized(model, before)
        model.load_state_dict(before, assign=how == "loaded without a copy")
        model = copy.deepcopy(model).double().float() if how == "moved" else model
    codes = model[0]._modules["weight"].codes
    assert codes.t().is_contiguous()
    with torch.no_grad():
        torch.testing.assert_close(model(random(1, 32)), source(random(1, 32)))
    assert model[0]._modules["weight"].codes is codes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_codes_that_are_looked_up_lie_in_rows():
    assert quantized(nn.Embedding(60, 16))[0]._modules["weight"].codes.is_contiguous()


def test_a_quantized_embedding_decodes_the_rows_that_are_read(monkeypatch):
    model = quantized(nn.Embedding(60, 16, padding_idx=1))
    numbers = torch.tensor([[3, 1, 59], [0, 3, 3]])
    expected = F.embedding(numbers, model[0].weight)
    monkeypatch.setattr(PQWeight, "decode", lambda self: pytest.fail("the whole table was decoded"))
    with torch.no_grad():
        assert torch.equal(model(numbers), expected)
        assert model(numbers[:0]).shape == (0, 3, 16)


def test_centroids_that_change_are_seen():
    model, x = quantized(nn.Linear(32, 48)), random(1, 32)
    weight = model[0]._modules["weight"]
    with torch.no_grad():
        before = model(x)
        weight.centroids.data.mul_(2)  # as optimizers do it: no version counts it
        torch.testing.assert_close(model(x) - model[0].bias, 2 * (before - model[0].bias), rtol=1e-3, atol=1e-4)
        weight.centroids.data = weight.centroids.data / 2
        torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-4)
    centroids = random(16, 4)
    codes = torch.zeros(2, 5, dtype=torch.uint8)
    first = kernels.linear(random(1, 8), codes, centroids)
    centroids.data.add_(1)  # as optimizers do it: no version counts it
    assert not torch.equal(kernels.linear(random(1, 8), codes, centroids), first)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-4)


def test_a_compiled_model_gives_the_same(monkeypatch):
    model, x = quantized(nn.Linear(32, 48)), random(2, 32)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))


def test_without_a_compiler_the_reference_serves_and_says_why(monkeypatch, caplog):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with caplog.at_level(logging.INFO, "fairseq_quant_noise.kernels.cpu"):
        assert cpu.library.__wrapped__() is None
    assert "no compiled kernels, plain torch serves: " in caplog.text


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a compiler that is a line of shell."""
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho compiled > "$2"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/fairseq_quant_noise"


def test_a_library_is_compiled_once_and_again_where_another_could_have_written_it(cache, tmp_path):
    path = cpu._compiled()
    path.write_text("kept")
    assert cpu._compiled().read_text() == "kept"
    path.chmod(0o777)
    assert cpu._compiled().read_text() == "compiled\n"
    assert path.stat().st_mode & 0o777 == 0o700
    hostile = tmp_path / "hostile.so"
    hostile.write_text("hostile")
    path.unlink()
    path.symlink_to(hostile)
    assert cpu._compiled().read_text() == "compiled\n"
    assert not path.is_symlink()
    assert hostile.read_text() == "hostile"


def test_no_library_comes_from_a_folder_that_others_write_to_or_own(cache, monkeypatch):
    path = cpu._compiled()
    cache.chmod(0o777)
    with pytest.raises(OSError, match="belongs to somebody else, or others can write to it"):
        cpu._compiled()
    cache.chmod(0o700)
    assert cpu._compiled() == path
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(OSError, match="belongs to somebody else"):
        cpu._compiled()


def test_the_environment_turns_the_compiled_form_off(tmp_path):
    code = (
        "import torch; from fairseq_quant_noise import kernels; from fairseq_quant_noise.kernels import cpu; "
        "print(cpu.takes(torch.ones(1)), kernels.nearest(torch.ones(2, 1), torch.ones(3, 1)).tolist())"
    )
    for switch, expected in (("reference", "False [0, 0]"), ("", "True [0, 0]")):
        run = python("-c", code, env={**os.environ, cpu.SWITCH: switch, "XDG_CACHE_HOME": str(tmp_path)}, fresh=False)
        assert run.stdout.strip() == expected, run.stderr
    (folder,) = tmp_path.iterdir()
    assert [path.suffix for path in folder.iterdir()] == [".so"]
    assert folder.stat().st_mode & 0o077 == 0


def test_half_precision_and_other_devices_take_the_reference():
    assert not kernels.takes_linear(torch.ones(1, 8).half(), torch.ones(4, 8).half())
    assert not kernels.takes_linear(torch.ones(1, 8, device="meta"), torch.ones(4, 8, device="meta"))
    assert not kernels.takes_linear(torch.ones(0, 8), torch.ones(4, 8))


@pytest.mark.parametrize("source", ["fairseq", "networks"])
def test_a_tied_softmax_multiplies_by_codes_too(monkeypatch, source):
    """Word by word, an adaptive softmax would decode a whole vocabulary for each."""
    if source == "fairseq":
        import fairseq_quant_noise

        fairseq_quant_noise.register()
        from fairseq.modules.adaptive_softmax import TiedLinear
    else:
        from fairseq_quant_noise.networks.adaptive import TiedLinear
    model = quantized(nn.Embedding(48, 32))
    words, into_band = (TiedLinear(nn.Parameter(torch.zeros(48, 32)), transpose) for transpose in (False, True))
    for tied in (words, into_band):
        intercept(tied)
        tied._modules["weight"] = model[0]._modules["weight"]
        del tied._parameters["weight"]
    x, weight = random(2, 32), model[0].weight.detach()
    with torch.no_grad():
        torch.testing.assert_close(into_band.eval()(random(2, 48)), random(2, 48) @ weight, rtol=1e-5, atol=1e-5)
        monkeypatch.setattr(PQWeight, "decode", lambda self: pytest.fail("the weight was decoded"))
        torch.testing.assert_close(words.eval()(x), x @ weight.t(), rtol=1e-5, atol=1e-5)
