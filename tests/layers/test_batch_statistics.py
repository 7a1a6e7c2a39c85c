"""Batch normalisation after quantization: statistics of the quantized network, not of the dense one."""

import copy
import functools
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toys import quiet, refuses

from fairseq_quant_noise import attach_noise, load, noise_of, quantize_, save
from fairseq_quant_noise.layers import calibrating, input_quantizers
from fairseq_quant_noise.layers.batch_statistics import batch_norms, estimating
from fairseq_quant_noise.noise import attach_rules, fitted_rules
from fairseq_quant_noise.plan.rules import NoiseRule
from fairseq_quant_noise.utils import ranks

CLASSES = 6
PLAN = {
    "stages": [{"match": ".*", "block_size": {"0": 9, r"\d\.3": 9, "default": 4}, "n_centroids": 8}],
    "centroids": {"weighted": False},
}


def images(n, seed):
    """(n, 3, 8, 8) noisy images of six patterns, and their classes."""
    patterns = torch.randn(CLASSES, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(CLASSES, (n,), generator=generator)
    light = 0.5 + torch.rand(n, 1, 1, 1, generator=generator)
    noise = 0.7 * torch.randn(n, 3, 8, 8, generator=generator)
    return F.interpolate(patterns[classes], 8, mode="bilinear") * light + noise, classes


def block(before, after, stride):
    """An inverted residual without the residual, as in EfficientNet."""
    wide = 4 * before
    return nn.Sequential(
        *(nn.Conv2d(before, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.SiLU()),
        *(nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.SiLU()),
        *(nn.Conv2d(wide, after, 1, bias=False), nn.BatchNorm2d(after)),
    )


def network():
    stem = (nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.SiLU())
    return nn.Sequential(
        *stem, block(8, 16, 2), block(16, 16, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES)
    )


def fit(model):
    x, y = images(512, 2)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(3):
        for batch in torch.randperm(len(x)).split(32):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return model


@functools.cache
def trained():
    torch.manual_seed(0)
    return fit(network())


@torch.no_grad()
def accuracy(model):
    x, y = images(512, 3)
    return float((model.eval()(x).argmax(1) == y).float().mean())


def quantized(plan=PLAN, calibration=None, model=None):
    return quantize_(copy.deepcopy(model or trained()), plan, calibration=calibration, progress=quiet)


def statistics(model):
    return [buffer.clone() for norm in batch_norms(model).values() for buffer in (norm.running_mean, norm.running_var)]


def equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def toy():
    """Noise, dropout and batch normalisation, in training mode but for one layer."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.BatchNorm1d(6, momentum=0.3), nn.ReLU())
    attach_noise(model, {"noise": [{"match": "0", "p": 0.5, "block_size": 1}]})
    model[3].eval()
    return model


# Noise


@pytest.mark.upstream(29)
@pytest.mark.parametrize(("kind", "p"), [("proxy", 0.1), ("pq", 0.3)])
def test_a_network_of_convolutions_learns_under_noise_on_all_of_them(kind, p):
    torch.manual_seed(0)
    model = network()
    attach_rules(model, fitted_rules(model, [NoiseRule(".*", p, kind, 4)]))
    assert not any(isinstance(model.get_submodule(name), nn.BatchNorm2d) for name in noise_of(model).weights)
    assert accuracy(fit(model)) > 0.9


# quantize_


@pytest.mark.upstream(34)
def test_calibration_gives_a_quantized_network_its_accuracy_back_and_the_file_keeps_it(tmp_path):
    unlabelled = images(512, 4)[0].split(128)
    model = quantized(calibration=unlabelled)
    assert accuracy(trained()) > 0.95
    assert accuracy(quantized()) < 0.5
    assert accuracy(model) > 0.75
    save(model, tmp_path / "model.safetensors", PLAN)
    again = load(tmp_path / "model.safetensors", into=network())
    assert equal(statistics(again), statistics(model))
    assert accuracy(again) == accuracy(model)


@pytest.mark.parametrize("kind", ["batches", "an iterator", "a function"])
def test_calibration_of_any_kind_is_used_in_full(kind):
    batches = images(96, 5)[0].split(32)
    given = {"batches": batches, "an iterator": iter(batches), "a function": lambda model: [model(x) for x in batches]}
    found = quantized(calibration=given[kind])
    expected = quantized()
    with estimating(expected):
        for batch in batches:
            expected(batch)
    assert equal(statistics(found), statistics(expected))


@pytest.mark.parametrize("batches", [1, 3])
def test_ranges_are_those_of_the_first_batches_under_the_new_statistics(batches):
    plan = {
        "stages": [{"match": ".*", "scheme": "int2"}],
        "activations": {"range": "tensor", "calibration_batches": batches},
    }
    given = images(96, 5)[0].split(32)
    model = quantized(plan, iter(given))
    found = {name: quantizer.range.clone() for name, quantizer in input_quantizers(model).items()}
    with calibrating(model):
        for batch in given[:batches]:
            model(batch)
    assert equal(found.values(), [quantizer.range for quantizer in input_quantizers(model).values()])
    assert {int(norm.num_batches_tracked) for norm in batch_norms(model).values()} == {3}


def test_a_network_with_batch_statistics_and_no_data_is_warned_of_in_one_line_with_the_cure(caplog):
    with caplog.at_level(logging.WARNING):
        model = quantized({"stages": [{"match": "0"}]}, model=nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)))
    (record,) = caplog.records
    assert record.getMessage().endswith("or calibration=BATCHES in Python")
    assert torch.equal(model[1].running_var, torch.ones(8))


# Estimating


def test_statistics_are_the_mean_over_batches_of_the_network_without_noise_and_dropout():
    model, batches = toy(), torch.randn(5, 16, 4).unbind()
    model[2].running_mean.fill_(7)
    with estimating(model):
        for batch in batches:
            model(batch)
    seen = [F.linear(batch, model[0]._parameters["weight"], model[0].bias) for batch in batches]
    torch.testing.assert_close(model[2].running_mean, torch.stack([x.mean(0) for x in seen]).mean(0))
    torch.testing.assert_close(model[2].running_var, torch.stack([x.var(0) for x in seen]).mean(0))
    assert [module.training for module in model] == [True, True, True, False]
    assert model[2].momentum == 0.3


def test_a_layer_that_no_forward_reaches_keeps_its_statistics():
    model = nn.ModuleDict({"used": nn.BatchNorm1d(4), "unused": nn.BatchNorm1d(4)})
    model["unused"].running_mean.fill_(7)
    with estimating(model):
        model["used"](torch.randn(8, 4))
    assert model["unused"].running_mean.eq(7).all()
    assert not model["used"].running_mean.eq(0).any()


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "^2: no input reached its batch statistics"),
        ([torch.randn(1, 4)], "one value a channel .*; give larger batches"),
        ([torch.full((8, 4), float("nan"))], "^2: its batch statistics are not finite"),
    ],
    ids=["none", "one", "NaN"],
)
def test_inputs_that_give_no_statistics_are_refused_and_change_nothing(batches, message):
    model = toy()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with refuses(message), estimating(model):
        for batch in batches:
            model(batch)
    assert equal(model.state_dict().values(), before.values())
    assert ([module.training for module in model], model[2].momentum) == ([True, True, True, False], 0.3)


def test_processes_end_with_the_mean_over_the_batches_of_all(monkeypatch):
    batches, sent = torch.randn(4, 16, 4).unbind(), []
    alone, one, other = toy(), toy(), toy()

    def run(model, of):
        with estimating(model):
            for batch in of:
                model(batch)

    run(alone, batches)
    monkeypatch.setattr(ranks, "rank_and_world", lambda: (0, 2))
    monkeypatch.setattr(ranks, "gather", lambda mine: sent.append(copy.deepcopy(mine)) or [mine, mine])
    run(other, batches[:1])
    monkeypatch.setattr(ranks, "gather", lambda mine: [mine, sent[0]])
    run(one, batches[1:])
    for ours, expected in zip(statistics(one), statistics(alone), strict=True):
        torch.testing.assert_close(ours, expected)
    assert int(one[2].num_batches_tracked) == 4
