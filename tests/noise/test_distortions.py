"""phi: what happens to a block that the noise hits."""

import pytest
import torch
from toys import refuses

from fairseq_quant_noise.noise import DISTORTIONS
from fairseq_quant_noise.noise.distortions import make_distortion
from fairseq_quant_noise.plan import vocabulary
from fairseq_quant_noise.plan.rules import NoiseRule
from fairseq_quant_noise.scalar import fake_quantize, fit_affine


def test_a_plan_knows_each_by_name():
    assert tuple(DISTORTIONS) == vocabulary.KINDS


KINDS = [*DISTORTIONS, ("pq", "int8"), ("mean", "int4"), ("int8", "proxy")]


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def phi_of(kind, rows=6, **rule):
    return make_distortion("fc", NoiseRule("fc", 0.5, kind, **rule), rows)


def fitted(kind, blocks, rows=6, **rule):
    phi = phi_of(kind, rows, **rule)
    phi.fit(blocks)
    return phi


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("all_hit", [True, False])
def test_a_distortion_keeps_shape_and_dtype_and_leaves_its_input_alone(kind, dtype, all_hit):
    blocks = normal(12, 4).to(dtype)
    before = blocks.clone()
    distorted = fitted(kind, blocks)(blocks, None if all_hit else torch.arange(12) % 3 == 0)
    assert distorted.shape == blocks.shape
    assert distorted.dtype == dtype
    assert torch.equal(blocks, before)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_blocks_that_are_hit_do_not_depend_on_which_others_are(kind):
    blocks, hit = normal(48, 4), torch.arange(48) % 3 == 0
    phi = fitted(kind, blocks)
    assert torch.equal(phi(blocks, hit)[hit], phi(blocks, None)[hit])
    assert phi(blocks, torch.zeros(48, dtype=torch.bool)).shape == blocks.shape


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("range_", ["tensor", "channel", "histogram"])
def test_another_distortion_takes_over_the_state(kind, range_):
    blocks = normal(48, 4)
    phi, other = fitted(kind, blocks, range=range_), phi_of(kind, range=range_)
    assert other.state() == {}
    other.load_state(phi.state())
    assert torch.equal(other(blocks * 1.1, None), phi(blocks * 1.1, None))


def test_proxy_is_zero_without_memory():
    distorted = phi_of("proxy")(torch.randn(1000, 8), None)
    assert not distorted.any()
    assert distorted.untyped_storage().nbytes() == 4


def test_mean_is_each_blocks_own_in_float32():
    blocks = normal(10, 8).half() * 1000
    expected = blocks.double().mean(1, keepdim=True).expand(10, 8)
    torch.testing.assert_close(phi_of("mean")(blocks, None).double(), expected, rtol=1e-3, atol=1e-2)
    far = torch.full((1, 8), 60000.0).half()  # whose sum fp16 does not hold
    assert torch.equal(phi_of("mean")(far, None), far)


@pytest.mark.parametrize("range_", ["tensor", "channel", "histogram"])
@pytest.mark.parametrize("block_size", [1, 4])
def test_int_rounds_on_the_weights_range_whatever_the_blocks(range_, block_size):
    weight = normal(6, 16)
    blocks = weight.view(-1, block_size)
    seen = fitted("int4", blocks, range=range_)(blocks, None)
    assert torch.equal(seen.view(6, 16), fake_quantize(weight, fit_affine("fc", weight, 4, range_)))


def test_pq_gives_the_centroid_nearest_now_of_the_codebook_of_the_last_fit():
    blocks = normal(64, 4)
    phi = fitted("pq", blocks, n_centroids=8)
    centroids = phi.state()["centroids"].clone()
    moved = blocks + 0.5 * normal(64, 4).flip(0)
    expected = centroids[torch.cdist(moved, centroids).argmin(1)]
    assert torch.equal(phi(moved, None), expected)
    assert not torch.equal(expected, centroids[phi.state()["codes"].long()])  # some are nearer to another one by now
    assert torch.equal(phi.state()["centroids"], centroids)


def test_pq_has_no_more_centroids_than_the_weight_can_feed():
    assert len(fitted("pq", normal(64, 4)).state()["centroids"]) == 16


def test_pq_goes_on_from_its_last_centroids():
    blocks = normal(400, 4)
    phi = fitted("pq", blocks, n_centroids=16)
    before = phi.state()["centroids"]
    phi.fit(blocks + 0.01)
    assert (phi.state()["centroids"] - before).abs().max() < 0.2  # the same ones in the same order


def test_a_composition_is_int8_of_the_nearest_centroid():
    blocks = normal(64, 4)
    phi = fitted(["pq", "int8"], blocks, rows=8, n_centroids=8)
    centroids = phi.state()["0.centroids"]
    found = centroids[torch.cdist(blocks, centroids).argmin(1)]
    scale = (found.max() - found.min()) / 255
    zero = (-found.min() / scale).round()
    expected = ((found / scale).round() + zero).clamp(0, 255).sub(zero) * scale
    torch.testing.assert_close(phi(blocks, None), expected)
    assert not torch.equal(phi(blocks, None), found)


def test_the_order_of_a_composition_counts():
    blocks = normal(64, 4)
    assert not fitted(["mean", "proxy"], blocks, 8)(blocks, None).any()
    assert not fitted(["proxy", "int4"], blocks, 8)(blocks, None).any()
    mean_last, int_last = (fitted(kinds, blocks, 8)(blocks, None) for kinds in (["int2", "mean"], ["mean", "int2"]))
    assert not torch.equal(mean_last, int_last)


@pytest.mark.parametrize("kind", ["int8", "int2", ["mean", "int8"]])
def test_a_weight_that_is_not_finite_is_refused_by_name(kind):
    blocks = normal(12, 4)
    blocks[3, 3] = float("nan")
    with refuses("^fc: the weight holds NaN or infinity"):
        fitted(kind, blocks)
