"""A weight in N-bit codes: what is read in training and evaluation, which gradient comes back, how states load."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from toys import INT_PLANS, TOKENS, Tied, adopting, by_torch, quiet, refuses, zoo

from fairseq_quant_noise import load, save
from fairseq_quant_noise.artifact import dense_state, pack
from fairseq_quant_noise.errors import DamagedFileError
from fairseq_quant_noise.layers import IntWeight, LatentIntWeight, adopt_quantized, quantized_weights, to_int_
from fairseq_quant_noise.layers import latent as latent_module
from fairseq_quant_noise.quantization.quantize import quantize_
from fairseq_quant_noise.scalar import RANGES, fit_affine
from fairseq_quant_noise.weights.discovery import find_weights

MODULES = {
    "Linear": lambda: (nn.Linear(6, 5), torch.randn(3, 6)),
    "Embedding": lambda: (nn.Embedding(7, 6, padding_idx=2), torch.tensor([0, 2, 6])),
    "Conv2d 1x1": lambda: (nn.Conv2d(4, 6, 1), torch.randn(2, 4, 5, 5)),
    "Conv2d 3x3": lambda: (nn.Conv2d(2, 3, 3, bias=False), torch.randn(2, 2, 5, 5)),
    "Conv2d depthwise": lambda: (nn.Conv2d(4, 4, 3, groups=4), torch.randn(2, 4, 5, 5)),
}


def in_model(module):
    return nn.ModuleDict({"m": module})


def latent(module, bits=4, range_="tensor"):
    return to_int_(find_weights(in_model(module))[0], bits, range_)


def quantized(plan, seed=0):
    return quantize_(zoo(seed), INT_PLANS[plan], progress=quiet)


# What is read


@pytest.mark.parametrize("range_", RANGES)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", MODULES)
def test_a_module_computes_with_torchs_fake_quantize_of_its_weight_and_so_does_its_file(name, bits, range_):
    torch.manual_seed(0)
    module, x = MODULES[name]()
    dense, twin = copy.deepcopy(module), copy.deepcopy(module)
    dense.weight.data = by_torch(module.weight.detach(), fit_affine(name, module.weight, bits, range_))
    weight = latent(module.eval(), bits, range_)
    from_file = adopting(in_model(twin), pack(in_model(module)).state_dict())
    assert isinstance(twin._modules["weight"], IntWeight)
    for seen in (weight.decode(), module.weight, twin.weight, from_file.eval()["m"].weight):
        assert torch.equal(seen, dense.weight)
    assert torch.equal(module(x), dense(x))
    assert torch.equal(twin(x), dense(x))


@pytest.mark.upstream(19)
@pytest.mark.parametrize("range_", RANGES)
def test_an_embedding_keeps_its_padding_word_of_zeros_without_a_gradient(range_):
    embedding = nn.Embedding(7, 6, padding_idx=2)
    weight = latent(embedding, 3, range_)
    embedding(torch.tensor([0, 2, 2, 6])).sum().backward()
    assert embedding.padding_idx == 2
    assert not embedding.eval().weight[2].any()
    assert weight.latent.grad.any(1).tolist() == [True, False, False, False, False, False, True]


def test_evaluation_sees_a_weight_that_changed_since():
    linear = nn.Linear(6, 5)
    weight = latent(linear.eval())
    assert linear.weight.abs().max() < 1
    with torch.no_grad():
        weight.latent.mul_(10)
    assert torch.equal(linear.weight, by_torch(weight.latent, fit_affine("", weight.latent, 4, "tensor")))


def test_evaluation_sees_a_weight_that_an_optimizer_wrote_through_data():
    """As fairseq's Adam does: no version counter tells of it."""
    linear = nn.Linear(6, 5)
    weight = latent(linear.eval())
    assert linear.weight.abs().max() < 1
    weight.latent.data.mul_(10)
    assert torch.equal(linear.weight, by_torch(weight.latent.data, fit_affine("", weight.latent, 4, "tensor")))


def test_a_weight_that_diverged_is_named():
    model = quantized("int8").eval()
    model.attn.q_proj._modules["weight"].latent.data[0, 0] = float("nan")
    with refuses(r"^attn\.q_proj: the weight holds NaN or infinity"):
        model(TOKENS)


# Training


@pytest.mark.parametrize("range_", RANGES)
@pytest.mark.parametrize("name", MODULES)
def test_the_gradient_is_that_of_the_dense_weight_at_the_quantized_value(name, range_):
    module, x = MODULES[name]()
    dense = copy.deepcopy(module)
    weight = latent(module.train(), 4, range_)
    dense.weight.data = weight.eval().decode().detach()
    weight.train()
    module(x).square().sum().backward()
    dense(x).square().sum().backward()
    assert torch.equal(weight.latent.grad, dense.weight.grad)


def test_the_parameter_stays_the_one_that_the_optimizer_holds():
    linear = nn.Linear(6, 5)
    parameter = linear.weight
    assert latent(linear).latent is parameter
    assert any(p is parameter for p in linear.parameters())


def train(model, forwards):
    """The weight as each forward sees it, with a step after each."""
    seen = []
    for _ in range(forwards):
        seen.append(model["m"].weight.detach().clone())
        with torch.no_grad():
            model["m"]._modules["weight"].latent.mul_(1.25)
    return seen


@pytest.fixture
def refresh(monkeypatch):
    monkeypatch.setattr(latent_module, "HISTOGRAM_REFRESH", 3)


@pytest.mark.parametrize(("range_", "searches"), [("histogram", [0, 3, 6]), ("tensor", [])])
def test_a_histogram_is_searched_for_again_every_so_many_training_forwards(refresh, range_, searches, monkeypatch):
    model = in_model(nn.Linear(6, 5))
    weight = to_int_(find_weights(model)[0], 4, range_).train()
    ranges = []
    for _ in range(8):
        train(model, 1)
        ranges.append(weight.affine.clone())
        model.eval()["m"].weight  # noqa: B018 (a look in evaluation does not count)
        model.train()
    changed = [i for i, r in enumerate(ranges) if not torch.equal(r, ranges[i - 1] if i else torch.zeros_like(r))]
    assert changed == searches


@pytest.mark.parametrize("forwards", [2, 3, 4])
def test_a_run_that_goes_on_from_a_checkpoint_is_bit_identical(refresh, forwards):
    torch.manual_seed(0)
    model = in_model(nn.Linear(6, 5))
    to_int_(find_weights(model)[0], 4, "histogram")
    train(model.train(), forwards)
    twin = adopting(in_model(nn.Linear(6, 5)), copy.deepcopy(model.state_dict())).train()
    assert all(torch.equal(a, b) for a, b in zip(train(model, 5), train(twin, 5), strict=True))
    assert int(twin["m"]._modules["weight"].age) == forwards + 5


def test_a_layer_that_runs_again_in_backward_counts_once():
    linear = nn.Linear(6, 5)
    weight = latent(linear, 4, "histogram").train()
    checkpoint(linear, torch.randn(2, 6), use_reentrant=False).sum().backward()
    assert int(weight.age) == 1


# Precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("range_", RANGES)
def test_scales_stay_in_float32(dtype, range_):
    model = in_model(nn.Linear(6, 5))
    to_int_(find_weights(model)[0], 4, range_)
    model["m"].weight  # noqa: B018 (a training forward)
    frozen = adopting(in_model(nn.Linear(6, 5)), pack(model).state_dict())
    for each in (model, frozen):
        weight = each["m"]._modules["weight"]
        scales = weight.affine.clone()
        each.to(dtype)
        assert weight.affine.dtype == torch.float32
        assert torch.equal(weight.affine, scales)
        assert each.train()["m"].weight.dtype == each.eval()["m"].weight.dtype == dtype


# States


def test_a_checkpoint_holds_the_dense_weight_under_its_own_name():
    model = quantize_(Tied(), INT_PLANS["int8"], progress=quiet)
    names = {f"{m}.weight{part}" for m in ("emb", "out") for part in ("", ".scalar", ".affine", ".age")}
    assert set(model.state_dict()) == names
    assert model.state_dict()["emb.weight"].data_ptr() == model.emb._modules["weight"].latent.data_ptr()


@pytest.mark.parametrize("spec", [[8, 200], [1, 0], [9, 0], [8], [8, 0, 0], [[8, 0]], 8, [8.0, 0.0]])
def test_a_damaged_entry_of_bits_and_range_is_named(spec):
    spec = torch.tensor(spec, dtype=None if isinstance(spec, list) and isinstance(spec[0], float) else torch.uint8)
    trained = quantize_(nn.Sequential(nn.Linear(8, 8)), INT_PLANS["int8"], progress=quiet)
    for state in (trained.state_dict(), pack(trained).state_dict()):
        damaged = {**state, "0.weight.scalar": spec}
        with refuses(r"^0\.weight\.scalar: damaged, it holds .*; give an earlier checkpoint", DamagedFileError):
            adopt_quantized(nn.Sequential(nn.Linear(8, 8)), damaged)
        with refuses(r"^0\.weight: scalar: damaged", DamagedFileError):
            dense_state(damaged)


def test_a_model_that_is_one_layer_adopts_its_state():
    source = quantize_(nn.Linear(8, 64), INT_PLANS["int4 by channel"], progress=quiet)
    assert "weight" in source.state_dict()
    target = adopting(nn.Linear(8, 64), source.state_dict())
    assert torch.equal(target.eval().weight, source.eval().weight)


def test_a_dense_state_loads_into_a_model_that_is_trained_in_n_bits():
    model = quantized("int3 by histogram").eval()
    model(TOKENS)
    model.load_state_dict(zoo(1).state_dict())
    assert torch.equal(model(TOKENS), quantized("int3 by histogram", 1).eval()(TOKENS))
    assert all(isinstance(w, LatentIntWeight) for w in quantized_weights(model).values())


def test_loading_leaves_the_state_as_it_was():
    model, state = quantized("int8"), zoo(1).state_dict()
    before = list(state)
    model.load_state_dict(state)
    assert list(state) == before


def test_a_state_of_other_bits_is_refused_or_seen_in_its_own_bits():
    model, other = quantized("int8"), quantized("int3 by histogram")
    try:
        adopting(model, other.state_dict())
    except (ValueError, RuntimeError):
        return
    assert torch.equal(model.eval()(TOKENS), other.eval()(TOKENS))


def test_a_state_of_a_weight_in_training_is_adopted_over_codes_or_refused(tmp_path):
    source = quantized("int8")
    save(source, tmp_path / "file")
    loaded = load(tmp_path / "file", into=zoo(1))
    with refuses("fc|emb"):
        adopt_quantized(loaded, source.state_dict())


def test_codes_that_do_not_fit_are_refused_by_name():
    state = pack(quantize_(in_model(nn.Linear(8, 7)), INT_PLANS["int8"], progress=quiet)).state_dict()
    with refuses(r"^m: codes of shape \(7, 8\) do not fit a weight of shape \(6, 8\)"):
        adopt_quantized(in_model(nn.Linear(8, 6)), state)


def test_quantizing_twice_is_refused():
    model = in_model(nn.Linear(8, 6))
    to_int_(find_weights(model)[0], 8, "tensor")
    with refuses("m is quantized already; a plan may quantize a weight once"):
        to_int_(find_weights(model)[0], 8, "tensor")


def test_a_copy_is_independent_and_keeps_its_ties():
    model = quantize_(Tied(), INT_PLANS["int8"], progress=quiet).eval()
    before = model.emb.weight.clone()
    twin = copy.deepcopy(model)
    assert twin.emb._modules["weight"] is twin.out._modules["weight"]
    with torch.no_grad():
        twin.emb._modules["weight"].latent.zero_()
    assert not twin.emb.weight.any()
    assert torch.equal(model.emb.weight, before)
    assert torch.equal(F.embedding(torch.tensor([3]), before), model.emb(torch.tensor([3])))
