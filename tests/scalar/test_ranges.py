"""Ranges: of the tensor, of each output channel, of a histogram; and what has none."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from toys import refuses

from fairseq_quant_noise.scalar import BITS, RANGES, Affine, fake_quantize, fit_affine
from fairseq_quant_noise.scalar.ranges import BINS, histogram_range


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def squared_error(weight, bits, range_):
    seen = fake_quantize(weight, fit_affine("w", weight, bits, range_))
    return (seen - weight).double().square().mean().item()


def with_outliers():
    """Standard normal numbers, and two that no one would spend codes on."""
    weight = normal(128, 128)
    weight[0, 0], weight[5, 5] = 20.0, -15.0
    return weight


# Channels


@pytest.mark.upstream(16)
@pytest.mark.parametrize(
    "module",
    [nn.Linear(6, 5), nn.Embedding(7, 4), nn.Conv2d(4, 6, 3), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(4, 3, 1)],
)
def test_channels_lie_along_the_output_dimension(module):
    weight = module.weight
    affine = fit_affine("w", weight, 8, "channel")
    assert affine.scale.shape == affine.zero_point.shape == weight.shape[:1]
    for i, row in enumerate(weight):
        alone = fit_affine("w", row[None], 8, "tensor")
        assert torch.equal(alone.scale, affine.scale[i : i + 1])
        assert torch.equal(fake_quantize(row[None], alone)[0], fake_quantize(weight, affine)[i])


@given(st.integers(2, 8), st.integers(1, 30), st.sampled_from(BITS), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_a_channels_step_is_never_larger_than_the_tensors(rows, columns, bits, seed):
    weight = normal(rows, columns, seed=seed)
    channel, tensor = (fit_affine("w", weight, bits, range_) for range_ in ("channel", "tensor"))
    assert (channel.scale <= tensor.scale).all()


def test_channels_of_different_sizes_have_less_error_each_in_its_own_range():
    weight = normal(16, 64) * torch.logspace(-3, 0, 16)[:, None]
    channel, tensor = (fake_quantize(weight, fit_affine("w", weight, 4, r)) for r in ("channel", "tensor"))
    errors = [(seen - weight).abs().amax(1) for seen in (channel, tensor)]
    assert errors[0].max() <= errors[1].max()
    assert errors[0][0] < 0.1 * errors[1][0]
    assert squared_error(weight, 4, "channel") < 0.5 * squared_error(weight, 4, "tensor")


# Histograms


@given(
    st.integers(1, 8),
    st.integers(1, 60),
    st.sampled_from(BITS),
    st.sampled_from([1e-30, 1e-6, 1.0, 1e30]),
    st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_a_histograms_range_lies_within_min_and_max_and_costs_a_bin_at_most(rows, columns, bits, size, seed):
    """The distance to the nearest code moves by no more than the number does: half a bin, to its bin's centre."""
    weight = normal(rows, columns, seed=seed) * size
    low, high = histogram_range(weight, bits)
    assert weight.min().clamp(max=0) <= low <= 0 <= high <= weight.max().clamp(min=0)
    bin_ = (weight.max().clamp(min=0).double() - weight.min().clamp(max=0)).item() / BINS
    least, most = (squared_error(weight.double(), bits, r) ** 0.5 for r in ("histogram", "tensor"))
    assert least <= most * 1.001 + bin_


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_outliers_are_clipped_where_that_costs_less(bits):
    weight = with_outliers()
    low, high = histogram_range(weight, bits)
    assert -15 < low < 0 < high < 20
    assert squared_error(weight, bits, "histogram") < 0.5 * squared_error(weight, bits, "tensor")


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("outliers", [True, False])
def test_no_range_of_a_coarse_grid_over_both_ends_is_much_better(bits, outliers):
    weight = with_outliers() if outliers else normal(128, 128)
    ends = torch.linspace(0.05, 1, 20)
    affines = [
        Affine.of_range(low.reshape(1), high.reshape(1), bits)
        for low in ends * weight.min()
        for high in ends * weight.max()
    ]
    best = min((fake_quantize(weight, a) - weight).square().mean().item() for a in affines)
    assert squared_error(weight, bits, "histogram") < 1.1 * best


@pytest.mark.parametrize("bits", BITS)
def test_on_a_gaussian_the_histogram_is_never_behind(bits):
    weight = normal(128, 128)
    assert squared_error(weight, bits, "histogram") <= 1.01 * squared_error(weight, bits, "tensor")


@pytest.mark.parametrize("sign", [1, -1])
def test_one_signed_and_empty_histograms(sign):
    low, high = histogram_range(sign * normal(32, 32).abs(), 4)
    assert (low if sign > 0 else high) == 0
    assert torch.equal(torch.cat(histogram_range(torch.zeros(3, 3), 4)), torch.zeros(2))
    assert fit_affine("w", torch.zeros(3, 3), 4, "histogram").scale == 1


# Mistakes


@pytest.mark.parametrize("range_", RANGES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_is_not_finite_is_refused_by_name(range_, value, dtype):
    weight = normal(4, 4).to(dtype)
    weight[2, 1] = value
    with refuses("^decoder.fc1: the weight holds NaN or infinity; use a checkpoint from before it diverged"):
        fit_affine("decoder.fc1", weight, 8, range_)
