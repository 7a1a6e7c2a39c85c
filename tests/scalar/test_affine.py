"""phi_intN and its codes: bit for bit torch's fake quantization, 0 exact, errors of half a step."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_quant_noise.scalar import BITS, Affine, fake_quantize, fit_affine

FORMS = {
    "normal": lambda w: w,
    "positive": lambda w: w.abs() + 0.5,
    "negative": lambda w: -w.abs() - 0.5,
    "skewed": lambda w: w + 2,
    "constant": lambda w: torch.full_like(w, 0.3),
    "zeros": torch.zeros_like,
    "some zeros": lambda w: w.where(w > 0, 0),
}
SIZES = [1e-38, 1e-30, 1e-8, 1.0, 1e8, 1e30]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def weights(draw):
    """Weights of two dimensions or four, of either sign or one, from tiny to large."""
    shape = draw(st.tuples(st.integers(1, 6), st.integers(1, 20)) | st.just((4, 2, 3, 3)))
    form, size = draw(st.sampled_from(list(FORMS))), draw(st.sampled_from(SIZES))
    return FORMS[form](normal(*shape, seed=draw(st.integers(0, 99)))) * size


def per_tensor(weight, affine):
    top = 2**affine.bits - 1
    return torch.fake_quantize_per_tensor_affine(weight, affine.scale[0].item(), int(affine.zero_point[0]), 0, top)


def per_channel(weight, affine):
    return torch.fake_quantize_per_channel_affine(weight, affine.scale, affine.zero_point, 0, 0, 2**affine.bits - 1)


@given(weights(), st.sampled_from(BITS))
@settings(max_examples=40, deadline=None)
def test_phi_is_torchs_fake_quantization_bit_for_bit(weight, bits):
    for range_, oracle in (("tensor", per_tensor), ("channel", per_channel), ("histogram", per_tensor)):
        affine = fit_affine("w", weight, bits, range_)
        expected = oracle(weight, affine)
        assert torch.equal(fake_quantize(weight, affine), expected)
        assert torch.equal(affine.decode(affine.codes(weight)), expected)


@given(weights(), st.sampled_from(BITS), st.sampled_from(["tensor", "channel"]))
@settings(max_examples=40, deadline=None)
def test_scale_and_zero_point_are_the_papers(weight, bits, range_):
    """s = (max - min) / (2^N - 1) and z = round(-min / s), in float64, of a range that holds 0."""
    affine = fit_affine("w", weight, bits, range_)
    rows = weight.double().reshape(len(weight) if range_ == "channel" else 1, -1)
    low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=2.0**-100)
    scale[low == high] = 1
    torch.testing.assert_close(affine.scale.double(), scale, rtol=1e-6, atol=0)
    assert (affine.zero_point + low / scale).abs().max() <= 0.5 + 1e-3
    assert (affine.scale.dtype, affine.zero_point.dtype) == (torch.float32, torch.int32)


@given(weights(), st.sampled_from(BITS), st.sampled_from(["tensor", "channel"]))
@settings(max_examples=40, deadline=None)
def test_the_error_is_at_most_half_a_step(weight, bits, range_):
    affine = fit_affine("w", weight, bits, range_)
    error = (fake_quantize(weight, affine) - weight).reshape(len(weight), -1).abs().double().amax(1)
    assert (error <= affine.scale.double() * (0.5 + 1e-4)).all()


@given(weights(), st.sampled_from(BITS), st.sampled_from(["tensor", "channel", "histogram"]))
@settings(max_examples=40, deadline=None)
def test_codes_fit_n_bits_and_zero_is_exact(weight, bits, range_):
    affine = fit_affine("w", weight, bits, range_)
    codes = affine.codes(weight)
    assert (codes.dtype, codes.shape) == (torch.uint8, weight.shape)
    assert int(codes.max()) < 2**bits
    assert not affine.decode(affine.codes(torch.zeros_like(weight))).any()
    assert not fake_quantize(weight, affine)[weight == 0].any()


@pytest.mark.parametrize("bits", BITS)
def test_all_codes_are_used_and_what_lies_outside_the_range_is_clamped(bits):
    affine = Affine.of_range(torch.tensor([-1.0]), torch.tensor([2.0]), bits)
    assert len(affine.codes(torch.linspace(-1, 2, 4000)[None]).unique()) == 2**bits
    outside = torch.tensor([[-100.0, 100.0]])
    assert affine.codes(outside).tolist() == [[0, 2**bits - 1]]
    assert torch.equal(fake_quantize(outside, affine), affine.decode(affine.codes(outside)))


def test_ties_go_to_the_even_code():
    affine = Affine.of_range(torch.tensor([0.0]), torch.tensor([15.0]), 4)
    assert affine.codes(torch.tensor([[0.5, 1.5, 2.5, 3.5]])).tolist() == [[0, 2, 2, 4]]


@pytest.mark.parametrize("value", [0.3, -0.3, 1e-30, -1e30])
@pytest.mark.parametrize("bits", BITS)
def test_a_constant_weight_is_kept(value, bits):
    weight = torch.full((3, 5), value)
    affine = fit_affine("w", weight, bits, "tensor")
    if abs(value) > 1e-29:  # below, a step of 2^-100 is the smallest
        torch.testing.assert_close(fake_quantize(weight, affine), weight, rtol=1e-6, atol=0)
    assert int(affine.codes(weight)[0, 0]) == (2**bits - 1 if value > 0 else 0) or abs(value) < 1e-29


def test_a_weight_of_zeros_stays_zero():
    affine = fit_affine("w", torch.zeros(3, 4), 8, "channel")
    assert affine.scale.tolist() == [1.0] * 3
    assert not fake_quantize(torch.zeros(3, 4), affine).any()


@pytest.mark.parametrize("sign", [1, -1])
def test_a_one_signed_weight_spends_its_codes_between_zero_and_its_largest(sign):
    weight = sign * normal(16, 16).abs()
    affine = fit_affine("w", weight, 8, "tensor")
    assert int(affine.zero_point) == (0 if sign > 0 else 255)
    assert affine.scale.item() == pytest.approx(weight.abs().max().item() / 255, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("range_", ["tensor", "channel", "histogram"])
def test_half_precision_weights_are_computed_in_float32(dtype, range_):
    weight = normal(16, 8).to(dtype)
    affine, full = (fit_affine("w", w, 8, range_) for w in (weight, weight.float()))
    assert torch.equal(affine.scale, full.scale)
    seen = fake_quantize(weight, affine)
    assert seen.dtype == dtype
    assert torch.equal(seen, fake_quantize(weight.float(), full).to(dtype))
    assert torch.equal(affine.codes(weight), full.codes(weight.float()))


@pytest.mark.upstream(15)
@pytest.mark.parametrize("bits", [4, 8])
def test_the_squared_error_is_that_of_steps_of_n_bits(bits):
    """Rounding errors are uniform in a step: s^2 / 12, with s a 15th of the range for int4 and a 255th for int8."""
    weight = normal(256, 256)
    step = (weight.max() - weight.min()) / (2**bits - 1)
    seen = fake_quantize(weight, fit_affine("w", weight, bits, "tensor"))
    error = (seen - weight).square().mean()
    assert 0.9 < error / (step**2 / 12) < 1.1
    assert len(seen.unique()) <= 2**bits


def test_phi_has_no_gradient_and_leaves_its_input_alone():
    weight = normal(4, 4).requires_grad_()
    before = weight.detach().clone()
    assert not fake_quantize(weight, fit_affine("w", weight, 2, "tensor")).requires_grad
    assert torch.equal(weight.detach(), before)


@pytest.mark.upstream(14)
def test_on_a_cpu_all_stays_there():
    affine = fit_affine("w", normal(4, 4), 8, "channel")
    assert {affine.scale.device.type, affine.zero_point.device.type, affine.codes(normal(4, 4)).device.type} == {"cpu"}
