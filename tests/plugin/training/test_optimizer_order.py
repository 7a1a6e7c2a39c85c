"""A run that goes on with --quant-noise-scalar, or without it: each weight keeps its own moments."""

import pytest
import torch
from lm_fixture import same, state_of

from fairseq_quant_noise.plugin.training.optimizer import part_of, slices_of
from fairseq_quant_noise.plugin.training.optimizer_order import in_order

SCALAR = ["--quant-noise-scalar", 0.5]
CASES = {"added": ([], [], SCALAR), "added, flat": (["--fp16"], [], SCALAR), "removed": ([], SCALAR, [])}


def moments(run):
    """By the weight's name in a checkpoint what the optimizer keeps of it, in its shape."""
    optimizer, found = run.trainer.optimizer, {}
    places = slices_of(optimizer)
    states = getattr(optimizer, "fp32_optimizer", optimizer).optimizer.state
    for name, parameter in run.model.named_parameters():
        stepped, cut = places[id(parameter)]
        kept = {**states[stepped], "stepped": stepped.detach()}
        found[name.removesuffix(".latent")] = {k: part_of(v, cut, parameter.shape) for k, v in kept.items()}
    return found


@pytest.mark.parametrize("case", CASES)
def test_each_weight_keeps_its_moments(lab, request, case):
    flags, before, after = CASES[case]
    if "flat" in case:
        request.getfixturevalue("flat")
    first = lab.train(*flags, *before, updates=3)
    loaded = lab.train(*flags, *after, "--restore-file", first.path, save=first.folder, updates=3)  # it is complete
    assert same(moments(loaded), moments(first))
    gone_on = lab.train(*flags, *after, "--restore-file", first.path, updates=5)
    assert gone_on.trainer.get_num_updates() == 5
    assert {entry["step"] for entry in moments(gone_on).values()} == {5}


@pytest.mark.parametrize("kind", ["plain", "adaptive"])
def test_a_state_in_the_models_own_order_stays_as_it_is(lab, runs, kind):
    state = state_of(runs.noised(kind).path)
    kept = state["last_optimizer_state"]
    assert in_order(runs.noised(kind).model, kept, [*state["model"]]) is kept


def test_the_state_of_other_parameters_stays_as_it_is():
    model = torch.nn.Linear(2, 3)
    state = {"state": {0: {"step": 1}, 1: {"step": 2}}, "param_groups": [{"params": [0, 1]}]}
    assert in_order(model, state, ["bias", "weight"])["state"] == {0: {"step": 2}, 1: {"step": 1}}
    for saved in (["weight"], ["bias", "other"], []):
        assert in_order(model, state, saved) is state
