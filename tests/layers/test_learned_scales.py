"""intN with scales that learn: where they start, their gradient, and what a checkpoint and a file hold."""

import copy

import pytest
import torch
from toys import TOKENS, adopting, quiet, refuses, zoo

from fairseq_quant_noise import load, quantize_, save
from fairseq_quant_noise.layers import adopt_quantized, quantized_weights
from fairseq_quant_noise.layers.latent import LatentIntWeight, LearnedIntWeight
from fairseq_quant_noise.layers.registry import weights_in
from fairseq_quant_noise.scalar import LEARNED_RANGES, fake_quantize, fit_affine

every_range = pytest.mark.parametrize("range_", LEARNED_RANGES)


def plan(range_, bits=3):
    return {"stages": [{"match": ".*", "scheme": f"int{bits}", "range": range_}]}


def weight(range_, bits=3, shape=(6, 40)):
    torch.manual_seed(0)
    learned = LearnedIntWeight(torch.nn.Parameter(torch.randn(shape)), bits, range_)
    learned.start()
    return learned.train()


@every_range
@pytest.mark.parametrize("bits", [2, 4])
def test_scales_start_where_the_error_is_less_than_with_the_extremes(range_, bits):
    dense = torch.randn(16, 200, generator=torch.Generator().manual_seed(0))
    wide = {"learned": "tensor", "learned-channel": "channel"}[range_]
    found, before = (
        (fake_quantize(dense, fit_affine("w", dense, bits, kind)) - dense).square().sum(1) for kind in (range_, wide)
    )
    assert found.sum() < before.sum()
    assert range_ == "learned" or (found <= before).all()


@every_range
@pytest.mark.parametrize("bits", [2, 4])
def test_the_gradients_are_those_of_lsq(range_, bits):
    learned = weight(range_, bits)
    upstream = torch.randn(6, 40)
    learned.decode().backward(upstream)
    affine = learned.fit()
    scale, zero = affine.scale.view(-1, 1), affine.zero_point.view(-1, 1)
    x, top = learned.latent.detach() / scale, 2**bits - 1
    low, high = -zero, top - zero
    slope = torch.where(x.round() < low, low, torch.where(x.round() > high, high, x.round() - x))
    inside = (x.round() >= low) & (x.round() <= high)
    assert not inside.all()
    assert torch.allclose(learned.latent.grad, upstream * inside)
    expected = (upstream * slope * scale).reshape(len(affine.scale), -1)
    expected = expected.sum(1) / (expected.shape[1] * top) ** 0.5
    assert torch.allclose(learned.log_scale.grad, expected, rtol=1e-4, atol=1e-6)


@every_range
def test_a_scale_that_is_too_large_learns_to_be_smaller(range_):
    learned = weight(range_)
    target = learned.latent.detach().clone()
    with torch.no_grad():
        learned.log_scale.add_(1.0)
    before = (learned.decode() - target).square().sum()
    optimizer = torch.optim.Adam([learned.log_scale], 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        (learned.decode() - target).square().sum().backward()
        optimizer.step()
    assert (learned.decode() - target).square().sum() < 0.5 * before
    assert (learned.log_scale < 0.6).all()


@every_range
def test_training_sees_what_evaluation_and_the_file_see(range_, tmp_path):
    model = quantize_(zoo(), plan(range_), progress=quiet).train()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(3):
        optimizer.zero_grad()
        model(TOKENS).square().mean().backward()
        optimizer.step()
    assert all(w.log_scale.abs().max() > 0 for w in quantized_weights(model).values())
    seen = model(TOKENS)
    assert torch.allclose(seen, model.eval()(TOKENS), atol=1e-6)
    save(model, tmp_path / "file")
    assert torch.allclose(load(tmp_path / "file", into=zoo(1))(TOKENS), seen, atol=1e-6)


@every_range
def test_a_checkpoint_brings_the_scales_back(range_):
    model = quantize_(zoo(), plan(range_), progress=quiet)
    with torch.no_grad():
        for w in quantized_weights(model).values():
            w.log_scale.uniform_(-1, 1)
    state = copy.deepcopy(model.state_dict())
    for other in (zoo(1), quantize_(zoo(1), plan("tensor", 4), progress=quiet)):
        twin = adopting(other, state)
        assert all(type(w) is LearnedIntWeight for w in quantized_weights(twin).values())
        assert all(torch.equal(t, twin.state_dict()[name]) for name, t in state.items())
        assert torch.equal(twin.eval()(TOKENS), model.eval()(TOKENS))
    held = weights_in(state)["fc.weight"]
    assert torch.equal(held.dense(), model.eval().fc.weight)
    back = adopting(twin, quantize_(zoo(), plan("tensor", 4), progress=quiet).state_dict())
    assert all(type(w) is LatentIntWeight for w in quantized_weights(back).values())


@every_range
def test_a_network_without_numbers_yet_takes_a_checkpoint(range_):
    state = quantize_(zoo(), plan(range_), progress=quiet).state_dict()
    twin = zoo(1).to("meta")
    adopt_quantized(twin, state)
    twin.load_state_dict(state, assign=True)
    assert all(torch.equal(t, twin.state_dict()[name]) for name, t in state.items())


def test_a_weight_that_is_not_finite_is_refused():
    model = zoo()
    with torch.no_grad():
        model.fc.weight[0, 0] = float("nan")
    with refuses("fc: the weight holds NaN or infinity"):
        quantize_(model, plan("learned"), progress=quiet)


def test_noise_has_no_learned_range():
    with refuses("unknown range 'learned'; known: tensor, channel, histogram"):
        quantize_(zoo(), plan("tensor") | {"noise": [{"match": ".*", "p": 0.1, "kind": "int8", "range": "learned"}]})
