"""A loss that is NaN: which tensor was the first."""

import pytest
import torch
from lm_fixture import one_error, state_of
from torch import nn

from fairseq_quant_noise.plugin.training.divergence import Watch


def train_and_fail(lab, capsys, state, *flags):
    """The one line with which training from this state ends."""
    state["last_optimizer_state"] = None
    folder = lab.new()
    with pytest.raises(SystemExit) as end:
        lab.train("--finetune-from-model", lab.checkpoint(state), *flags, save=folder, updates=9)
    assert end.value.code == 2
    assert not (folder / "checkpoint_last.pt").exists()
    return one_error(capsys.readouterr())


def test_a_weight_that_holds_nan_is_named(lab, runs, capsys):
    state = state_of(runs.stock("plain").path)
    state["model"]["decoder.layers.1.fc2.weight"][3, 4] = float("nan")
    message = train_and_fail(lab, capsys, state, "--quant-noise-pq", 0.1)
    assert message.startswith("update 1: ")
    assert "decoder.layers.1.fc2.weight itself holds NaN" in message
    assert "--lr" in message


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_output_that_held_the_first_nan_is_named_under_the_same_layerdrop_and_noise(lab, runs, capsys, seed):
    """Layer 1 is left out of half of the updates; the one that fails is looked at with it."""
    state = state_of(runs.stock("plain").path)
    weight = state["model"]["decoder.layers.1.fc1.weight"]
    weight.div_(weight.abs().max()).mul_(3e38)
    flags = ["--quant-noise-pq", 0.1, "--decoder-layerdrop", 0.5, "--seed", seed]
    message = train_and_fail(lab, capsys, state, *flags)
    assert "the first tensor that held NaN is the output of decoder.layers.1.fc2 " in message
    assert "after infinity in the output of decoder.layers.1.fc1 " in message


class Root(nn.Module):
    """Its output is finite at 0, and its gradient is not."""

    def forward(self, x):
        return x.sqrt()


def test_a_gradient_that_is_not_finite_is_named_where_all_outputs_are():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), Root())
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    with Watch(model) as watch:
        model(torch.zeros(3, 2)).sum().backward()
    assert watch.verdict() == "the first tensor that held infinity is the gradient of the output of 1 (3, 2)"
    assert not any(module._forward_hooks for module in model.modules())


def test_nothing_is_said_of_what_is_finite():
    model = nn.Linear(2, 2)
    with Watch(model) as watch:
        model(torch.ones(1, 2)).sum().backward()
    assert watch.verdict() is None
