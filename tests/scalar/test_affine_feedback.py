"""Error feedback for intN: weights that are rounded by what a layer's outputs lose."""

import copy

import pytest
import torch
from torch import nn
from toys import Tied, quiet, refuses

from fairseq_quant_noise import load, quantize_, save
from fairseq_quant_noise.layers import quantized_weights
from fairseq_quant_noise.scalar import feedback, fit_affine
from fairseq_quant_noise.scalar.feedback import refined

RANGES = ["tensor", "channel", "learned", "learned-channel"]


def inputs(n=400, seed=1, size=24):
    """Correlated ones."""
    mixed = torch.randn(size, size, generator=torch.Generator().manual_seed(9))
    return torch.randn(n, size, generator=torch.Generator().manual_seed(seed)) @ mixed


def metric(size=24):
    x = inputs(size=size).double()
    second = x.t() @ x / len(x) + 0.05 * torch.eye(size)
    return second, torch.linalg.cholesky(torch.linalg.inv(second), upper=True).float()


def weight(rows=40, size=24):
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(0))


def lost(numbers, of, second):
    errors = (numbers - of).double()
    return float((errors @ second * errors).sum())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("range_", RANGES)
def test_outputs_lose_less_than_by_rounding(range_, bits):
    of, (second, factor) = weight(), metric()
    affine = fit_affine("w", of, bits, range_)
    free = range_.startswith("learned")
    codes, grid = refined(of, second.float(), factor, affine, rows=torch.ones(40), free=free)
    assert codes.dtype == torch.uint8
    assert int(codes.max()) < 2**bits
    assert lost(grid.decode(codes), of, second) < 0.7 * lost(affine.decode(affine.codes(of)), of, second)
    assert torch.equal(grid.scale, affine.scale) != free


@pytest.mark.parametrize("range_", ["tensor", "channel"])
def test_a_range_is_that_of_the_rounded_numbers_too(range_):
    of, (second, factor) = weight(), metric()
    codes, grid = refined(of, second.float(), factor, fit_affine("w", of, 3, range_), rows=torch.ones(40), free=False)
    again = fit_affine("w", grid.decode(codes), 3, range_)
    torch.testing.assert_close(again.scale, grid.scale)
    assert torch.equal(again.codes(grid.decode(codes)), codes)


def test_parts_give_the_same_as_the_whole(monkeypatch):
    of, (second, factor) = weight(), metric()
    given = of, second.float(), factor, fit_affine("w", of, 3, "learned-channel")
    whole = refined(*given, rows=torch.ones(40), free=True)
    monkeypatch.setattr(feedback, "_NUMBERS", 7 * 24)
    monkeypatch.setattr(feedback, "_COLUMNS", 5)
    parts = refined(*given, rows=torch.ones(40), free=True)
    assert (whole[0] != parts[0]).float().mean() < 0.02  # sums in another order
    torch.testing.assert_close(whole[1].scale, parts[1].scale, rtol=1e-2, atol=0)


def test_fitted_scales_have_the_least_loss():
    of, (second, factor) = weight(), metric()
    affine = fit_affine("w", of, 2, "learned-channel")
    codes = affine.rounded(of)
    best = feedback._fitted(of, second.float(), affine, codes, torch.ones(40))
    least = lost(best.decode(codes), of, second)
    for factor in (0.98, 1.02):
        moved = feedback.replace(best, scale=best.scale * factor)
        assert lost(moved.decode(codes), of, second) > least


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 8))


def quantized(rule, kind="feedback", model=None, calibration=None):
    plan = {"stages": [{"match": ".*", **rule}], "encode": kind}
    return quantize_(model or network(), plan, calibration=calibration or [inputs()], progress=quiet).eval()


@pytest.mark.parametrize("range_", RANGES)
def test_a_network_is_nearer_on_other_inputs_and_so_is_its_file(range_, tmp_path):
    rule, x, dense = {"scheme": "int3", "range": range_}, inputs(seed=5), network().eval()
    plain, fed = (quantized(rule, kind) for kind in ("plain", "feedback"))
    with torch.no_grad():
        away = [float((model(x) - dense(x)).square().sum()) for model in (plain, fed)]
        assert away[1] < 0.7 * away[0]
        save(fed, tmp_path / "fed.safetensors")
        file = load(tmp_path / "fed.safetensors", network())
        for name, stored in quantized_weights(file).items():
            torch.testing.assert_close(stored.decode(), quantized_weights(fed)[name].decode())


def test_it_works_for_convolutions_and_tied_embeddings():
    torch.manual_seed(0)
    x = torch.nn.functional.avg_pool2d(torch.randn(8, 6, 20, 20), 5, stride=1)  # neighbours are alike
    convolution = nn.Sequential(nn.Conv2d(6, 12, 3), nn.Conv2d(12, 12, 3, groups=12))
    dense = copy.deepcopy(convolution).eval()
    rule = {"scheme": "int3", "range": "channel"}
    away = []
    for kind in ("plain", "feedback"):
        model = quantized(rule, kind, copy.deepcopy(convolution), [x])
        away.append(float((model(x) - dense(x)).detach().square().sum()))
    assert away[1] < 0.7 * away[0]

    tied = quantized(rule, "feedback", Tied(), [torch.randint(0, 10, (40, 3))])
    (stored,) = quantized_weights(tied).values()
    assert len(torch.unique(stored.latent.detach()[0].round(decimals=4))) <= 8


def test_feedback_that_wins_nothing_leaves_the_weight_as_it_is():
    model, x = network(), torch.eye(24)  # no correlations
    before = model[0].weight.detach().clone()
    only = {"stages": [{"match": "0", "scheme": "int4"}], "encode": "feedback"}
    quantize_(model, only, inputs={"0.weight": x}, progress=quiet)
    assert torch.equal(next(iter(quantized_weights(model).values())).latent, before)


def test_histograms_are_named_or_refused():
    said = []
    plan = {
        "stages": [
            {"match": "0", "scheme": "int4", "range": "histogram"},
            {"match": "2", "scheme": "int4", "range": "channel"},
        ],
        "encode": "feedback",
    }
    quantize_(network(), plan, calibration=[inputs()], progress=said.append)
    assert "note: without error feedback, since a histogram's range is searched for again: 0" in said
    with refuses("a histogram's range is searched for again; give range: channel, or leave it out"):
        quantized({"scheme": "int4", "range": "histogram"})
