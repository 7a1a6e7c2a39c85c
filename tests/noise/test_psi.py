"""psi(b | J) = phi(b) if b in J else b, with straight-through gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_quant_noise.noise.distortions import Proxy
from fairseq_quant_noise.noise.psi import draw_blocks, draw_clusters, psi

HALVES = [torch.float32, torch.float16, torch.bfloat16]
proxy = Proxy()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_the_share_of_blocks_hit_is_p(p):
    n = 100_000
    count = int(draw_blocks(n, p, generator()).sum())
    assert abs(count - n * p) < 5 * math.sqrt(n * p * (1 - p))  # five standard deviations of a binomial


def test_a_small_p_is_met_to_its_step():
    n = 2_000_000
    count = int(draw_blocks(n, 0.0007, generator()).sum())
    assert abs(count - n * round(0.0007 * 2**16) / 2**16) < 5 * math.sqrt(n * 0.0007)


def test_p_0_hits_no_block_and_p_1_hits_all():
    assert not draw_blocks(1000, 0.0, generator()).any()
    assert draw_blocks(1000, 1.0, generator()).all()


def test_a_seed_gives_one_draw():
    assert torch.equal(draw_blocks(100, 0.5, generator(7)), draw_blocks(100, 0.5, generator(7)))
    assert not torch.equal(draw_blocks(100, 0.5, generator(7)), draw_blocks(100, 0.5, generator(8)))


def test_neighbouring_blocks_are_hit_independently():
    hit = draw_blocks(100_000, 0.3, generator())
    both = int((hit[:-1] & hit[1:]).sum())
    assert abs(both - 0.09 * 1e5) < 5 * math.sqrt(1e5 * 0.09 * 0.91)


def test_blocks_of_one_centroid_are_hit_together_and_centroids_independently():
    codes = torch.randint(200, (5000,), generator=generator(), dtype=torch.uint8)
    count = 0
    for seed in range(50):
        hit = draw_clusters(codes, 200, 0.3, generator(seed))
        hit_centroids = codes[hit].unique()
        assert torch.equal(hit, torch.isin(codes, hit_centroids))
        count += len(hit_centroids)
    n = 50 * len(codes.unique())
    assert abs(count - 0.3 * n) < 5 * math.sqrt(n * 0.3 * 0.7)


@given(st.integers(1, 8), st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_blocks_in_j_are_distorted_whole_and_the_others_left_as_they_are(rows, per_row, d, seed):
    weight = torch.randn(rows, per_row * d, generator=generator(seed))
    hit = draw_blocks(rows * per_row, 0.5, generator(seed))
    seen = psi(weight, hit, d, lambda blocks, hit: blocks * 3).reshape(-1, d)
    blocks = weight.reshape(-1, d)
    assert torch.equal(seen[hit], blocks[hit] * 3)
    assert torch.equal(seen[~hit], blocks[~hit])


@pytest.mark.parametrize("dtype", HALVES)
def test_dtype_and_shape_are_kept_and_the_weight_is_not_written_to(dtype):
    weight = torch.randn(4, 2, 3, 3, generator=generator()).to(dtype)
    before = weight.clone()
    seen = psi(weight, draw_blocks(8, 0.5, generator()), 9, proxy)
    assert seen.dtype == dtype
    assert seen.shape == weight.shape
    assert torch.equal(weight, before)


def test_a_weight_that_is_not_contiguous_is_cut_by_rows_too():
    weight = torch.randn(4, 8, 3, 3).to(memory_format=torch.channels_last)
    hit = draw_blocks(32, 0.5, generator())
    assert torch.equal(psi(weight, hit, 9, proxy), psi(weight.contiguous(), hit, 9, proxy))
    transposed = torch.randn(8, 4).t()
    assert torch.equal(psi(transposed, hit[:8], 4, proxy), psi(transposed.contiguous(), hit[:8], 4, proxy))


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_the_gradient_goes_straight_through_to_every_block(p):
    """y = x psi(W)^T, so d loss / d psi(W) = G^T x, and that is W's gradient in the zeroed blocks too."""
    weight = torch.randn(6, 8, generator=generator(), requires_grad=True)
    x, upstream = torch.randn(5, 8, generator=generator(1)), torch.randn(5, 6, generator=generator(2))
    (x @ psi(weight, draw_blocks(12, p, generator(3)), 4, proxy).t()).backward(upstream)
    torch.testing.assert_close(weight.grad, upstream.t() @ x)


def test_the_input_sees_the_noised_weight_in_its_gradient():
    weight, x = torch.randn(6, 8), torch.randn(5, 8, requires_grad=True)
    seen = psi(weight, draw_blocks(12, 0.5, generator()), 4, proxy)
    (x @ seen.t()).sum().backward()
    torch.testing.assert_close(x.grad, seen.sum(0).expand(5, 8))


def test_without_a_mask_every_block_is_hit():
    weight = torch.randn(4, 8)
    assert torch.equal(psi(weight, None, 4, lambda blocks, hit: blocks + 1), weight + 1)
