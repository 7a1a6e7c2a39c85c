"""A weight to codes and centroids: shapes, the error it reports, and what it refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import refuses

from fairseq_quant_noise.pq.encode import encode, nearest


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("shape", "d", "codes"), [((32, 16), 4, (32, 4)), ((8, 4, 3, 3), 9, (8, 4))])
def test_there_is_a_byte_for_each_block_and_a_row_for_each_row(shape, d, codes):
    found = encode("fc", normal(*shape), d, 8)
    assert (found.codes.shape, found.codes.dtype) == (codes, torch.uint8)
    assert (found.centroids.shape, found.centroids.dtype) == ((8, d), torch.float32)


def test_the_relative_error_is_that_of_the_decoded_weight():
    weight = normal(32, 16)
    found = encode("fc", weight, 4, 16)
    decoded = found.centroids[found.codes.long()].view(32, 16)
    assert found.relative_error == pytest.approx(((weight - decoded).norm() / weight.norm()).item(), rel=1e-5)
    assert 0.2 < found.relative_error < 0.8


def test_importance_lowers_the_error_it_weighs_and_the_relative_error_is_still_that_of_the_decoded_weight():
    weight, importance = normal(64, 64), (2 * normal(64, 64)).exp() * 1e-12
    errors = {}
    for weighs in (None, importance):
        found = encode("fc", weight, 4, 16, importance=weighs)
        away = weight - found.centroids[found.codes.long()].view(64, 64)
        assert found.relative_error == pytest.approx((away.norm() / weight.norm()).item(), rel=1e-5)
        errors[weighs is None] = float((importance * away.square()).sum())
    assert errors[False] < 0.9 * errors[True]


@pytest.mark.parametrize("importance", [torch.zeros(32, 16), torch.full((32, 16), 3e-30)])
def test_importance_that_tells_nothing_apart_changes_no_code(importance):
    plain, same = (encode("fc", normal(32, 16), 4, 16, importance=weighs) for weighs in (None, importance))
    assert torch.equal(plain.codes, same.codes)


def test_a_number_without_gradient_is_near_nothing_still():
    importance = torch.ones(32, 16)
    importance[16:] = 0
    found = encode("fc", normal(32, 16), 4, 16, importance=importance)
    away = normal(32, 16) - found.centroids[found.codes.long()].view(32, 16)
    assert away[:16].norm() < away[16:].norm() < 0.95 * normal(32, 16)[16:].norm()


def test_a_zero_weight_has_no_error():
    found = encode("fc", torch.zeros(8, 8), 4, 4)
    assert found.relative_error == 0.0
    assert not found.centroids.any()


def test_a_seed_gives_the_same_bits_and_the_global_random_state_is_left_alone():
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    a, b = (encode("fc", normal(64, 16), 4, 16, seed=5) for _ in range(2))
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(a.centroids, b.centroids)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_encoded_in_fp32(dtype):
    assert encode("fc", normal(16, 8).to(dtype), 4, 8).centroids.dtype == torch.float32


def test_a_parameter_is_encoded_without_its_graph():
    assert not encode("fc", torch.nn.Parameter(normal(16, 8)), 4, 8).centroids.requires_grad


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name(value):
    weight = normal(16, 8)
    weight[3, 3] = value
    with refuses("^decoder.fc1: the weight holds NaN or infinity; quantize a checkpoint from before it diverged"):
        encode("decoder.fc1", weight, 4, 8)


def test_a_weight_beyond_fp16_is_refused_by_name():
    with refuses(r"^fc: a weight of 7e\+04 does not fit fp16 centroids \(at most 65504\)"):
        encode("fc", torch.full((4, 4), -70_000.0), 4, 1)


def test_the_largest_fp16_number_is_encoded():
    found = encode("fc", torch.full((8, 8), 65504.0), 4, 2)
    assert found.centroids.half().isfinite().all()


# The nearest centroid


@given(st.integers(1, 200), st.integers(1, 9), st.integers(1, 256), st.sampled_from([1e-12, 1.0, 1e12]))
@settings(max_examples=40, deadline=None)
def test_nearest_is_the_argmin_of_brute_force(n, d, k, size):
    blocks, centroids = normal(n, d) * size, normal(k, d).flip(0) * 1.1 * size
    distance = (blocks[:, None].double() - centroids.double()).square().sum(2)  # (n, K)
    codes = nearest(blocks, centroids)
    assert (codes.dtype, codes.shape) == (torch.int64, (n,))
    chosen = distance.gather(1, codes[:, None])[:, 0]
    assert torch.allclose(chosen, distance.min(1).values, rtol=1e-5, atol=1e-5 * size**2)


def test_of_two_equally_near_centroids_the_first_is_taken():
    assert nearest(torch.zeros(3, 2), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])).tolist() == [0, 0, 0]


def test_a_centroid_is_nearest_to_itself():
    centroids = normal(256, 8)
    assert nearest(centroids, centroids).tolist() == list(range(256))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_distances_are_in_float32_whatever_the_dtype(dtype):
    blocks, centroids = normal(100, 4).to(dtype), normal(16, 4).flip(0)
    assert torch.equal(nearest(blocks, centroids), nearest(blocks.float(), centroids))


def test_no_blocks_have_no_codes():
    assert nearest(torch.zeros(0, 4), normal(8, 4)).shape == (0,)
