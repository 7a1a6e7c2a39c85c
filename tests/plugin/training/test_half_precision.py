"""Checkpoints of a half-precision training: the fp32 copies, the loss scale, flat states and others."""

import copy

import pytest
import torch
from half import across_a_stage, build, every_optimizer, every_precision, memory, network, step
from lm_fixture import same

pytestmark = pytest.mark.usefixtures("flattens")


def reloaded(lab, name, precision, state, model):
    """What a process that starts anew with this checkpoint has: a copy of the network, and its optimizer."""
    model = copy.deepcopy(model)
    optimizer = build(lab, name, precision, list(model.values()))
    optimizer.load_state_dict(copy.deepcopy(state))
    return model, optimizer


def of_fairseq(state):
    """The optimizer's state as fairseq saves it."""
    return {key: value for key, value in state.items() if not key.startswith("quant_noise_")}


@every_precision
def test_a_checkpoint_from_after_a_stage_goes_on_bit_for_bit(lab, precision):
    for name in every_optimizer(precision):
        model, optimizer = across_a_stage(lab, name, precision)
        step(optimizer, model, range(5, 8))
        again, resumed = reloaded(lab, name, precision, optimizer.state_dict(), model)
        assert same(memory(resumed, again), memory(optimizer, model)), name
        for of, net in ((optimizer, model), (resumed, again)):
            step(of, net, range(8, 12))
        assert same(memory(resumed, again), memory(optimizer, model)), name
        assert same(dict(again), dict(model)), name


@pytest.mark.parametrize("name", ["adam", "nag", "sgd"])
@pytest.mark.parametrize("saved", ["fp16", "fp16, not flat"])
@pytest.mark.parametrize("loaded", ["fp16", "fp16, not flat"])
def test_a_checkpoint_loads_whether_it_is_flat_or_not(lab, name, saved, loaded):
    model = network("fp16", ("first", "old", "last"))
    optimizer = build(lab, name, saved, list(model.values()))
    assert optimizer.has_flat_params == (saved == "fp16")
    step(optimizer, model, range(3))
    again, resumed = reloaded(lab, name, loaded, optimizer.state_dict(), model)
    for of, net in ((optimizer, model), (resumed, again)):
        step(of, net, [3])
    assert same(memory(resumed, again), memory(optimizer, model))


@pytest.mark.parametrize("precision", ["fp16", "fp16, not flat", "bf16"])
def test_a_checkpoint_of_fairseq_alone_loads_as_fairseq_loads_it(lab, precision):
    model = network(precision, ("old", "last"))
    optimizer = build(lab, "adam", precision, list(model.values()))
    step(optimizer, model, range(3))
    again, resumed = reloaded(lab, "adam", precision, of_fairseq(optimizer.state_dict()), model)
    found, kept = memory(resumed, again), memory(optimizer, model)
    for name, parameter in model.items():
        assert torch.equal(found[name]["stepped"], parameter.detach().float())
        assert not torch.equal(found[name]["stepped"], kept[name]["stepped"])
        assert torch.equal(found[name]["exp_avg_sq"], kept[name]["exp_avg_sq"])


@pytest.mark.parametrize("precision", ["fp16", "fp16, not flat", "bf16"])
def test_copies_of_other_weights_are_left_aside(lab, precision):
    """A mean of checkpoints keeps the last one's optimizer state; its copies would bring the last weights back."""
    model = network(precision, ("old", "last"))
    optimizer = build(lab, "adam", precision, list(model.values()))
    step(optimizer, model, range(3))
    kept = memory(optimizer, model)["last"]["stepped"]
    state = copy.deepcopy(optimizer.state_dict())
    with torch.no_grad():
        model["old"].mul_(2)
    again, resumed = reloaded(lab, "adam", precision, state, model)
    found = memory(resumed, again)
    assert torch.equal(found["old"]["stepped"], model["old"].detach().float())
    assert torch.equal(found["last"]["stepped"], kept)


@pytest.mark.parametrize("precision", ["fp16", "memory-efficient fp16", "amp"])
def test_the_loss_scale_grows_when_it_was_due(lab, precision):
    """After 3 of 5 updates without an overflow; torch's scaler, off where there is no GPU, stands here on the CPU."""

    def scaled(model):
        optimizer = build(lab, "adam", precision, list(model.values()))
        if precision == "amp":
            optimizer._grad_scaler = torch.amp.GradScaler("cpu", init_scale=128.0, growth_interval=5)
        else:
            optimizer.scaler.scale_window = 5
        return optimizer

    def scales(optimizer, net, updates):
        found = []
        for update in updates:
            step(optimizer, net, [update])
            scaler = optimizer.scaler
            found.append(scaler.get_scale() if precision == "amp" else scaler.loss_scale)
        return found

    model = network(precision, ("old", "last"))
    optimizer = scaled(model)
    scales(optimizer, model, range(3))
    again = copy.deepcopy(model)
    resumed = scaled(again)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    expected = scales(optimizer, model, range(3, 12))
    assert len(set(expected)) > 2
    assert scales(resumed, again, range(3, 12)) == expected
