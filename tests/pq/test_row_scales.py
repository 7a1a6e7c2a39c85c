"""A scale for each row: what is minimized, where scales start, and where they end."""

import pytest
import torch
from toys import refuses

from fairseq_quant_noise.pq.encode import encode, encode_together
from fairseq_quant_noise.pq.row_scales import LEAST, MOST, first_scales, fitted_scales


def uneven(rows=96, columns=32, seed=0):
    """A weight whose rows differ in size by 100 times."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-1, 1, rows)
    return torch.randn(rows, columns, generator=generator) * sizes[:, None]


def seen(found):
    """What the codes stand for."""
    rows = found.centroids[found.codes.flatten().long()].view(len(found.codes), -1)
    return rows if found.scales is None else rows * found.scales[:, None]


def error(found, weight, counts=1.0):
    return float(((seen(found) - weight).square() * counts).sum())


@pytest.mark.parametrize("weighted", [False, True])
def test_uneven_rows_are_encoded_with_less_of_the_weights_own_error(weighted):
    weight = uneven()
    counts = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) if weighted else None
    plain = encode("w", weight, 4, 16, importance=counts)
    scaled = encode("w", weight, 4, 16, importance=counts, row_scales=True)
    by = 1.0 if counts is None else counts
    assert error(scaled, weight, by) < 0.8 * error(plain, weight, by)
    assert plain.scales is None
    norm = torch.linalg.vector_norm(weight)
    assert scaled.relative_error == pytest.approx(error(scaled, weight) ** 0.5 / float(norm), rel=1e-5)


def test_centroids_weigh_what_they_cost_in_the_weight():
    """Two sizes of rows and one centroid: it is that of the larger rows, whose errors cost 10,000 times as much."""
    weight = torch.cat([torch.full((4, 2), 0.01) * torch.tensor([1.0, 3.0]), torch.ones(4, 2)])
    found = encode("w", weight, 2, 1, row_scales=True)
    ratio = found.centroids[0, 1] / found.centroids[0, 0]
    assert ratio == pytest.approx(1.0, abs=1e-3)


def test_scales_are_the_sizes_of_the_rows_relative_to_the_codebooks_weights():
    one, other = uneven(seed=1), 5 * uneven(seed=2)
    both = first_scales([one, other])
    whole = torch.cat([one, other]).square().mean().sqrt()
    for weight, scales in zip((one, other), both, strict=True):
        assert torch.allclose(scales, weight.square().mean(1).sqrt() / whole, rtol=1e-3)
        assert torch.equal(scales, scales.half().float())


def test_the_fitted_scales_cost_least():
    generator = torch.Generator().manual_seed(0)
    weight, rows, counts = (torch.rand(8, 6, generator=generator) + 0.5 for _ in range(3))
    found = fitted_scales(weight, rows, counts * rows, torch.ones(8))

    def cost(scales):
        return (counts * (weight - scales[:, None] * rows).square()).sum(1)

    for factor in (0.99, 1.01):
        assert (cost(found) < cost(factor * found)).all()


def test_rows_without_numbers_and_rows_of_any_size_have_a_scale_that_fp16_holds():
    weight = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    weight[0], weight[1], weight[2] = 0, weight[1] * 1e-20, weight[2] * 1e4
    found = encode("w", weight, 4, 4, row_scales=True)
    assert found.scales.isfinite().all()
    assert found.scales.min() >= LEAST
    assert found.scales.max() <= MOST
    zeros = encode("w", torch.zeros(4, 8), 4, 2, row_scales=True)
    assert torch.equal(zeros.scales, torch.ones(4))
    assert zeros.relative_error == 0


def test_a_convolution_and_several_weights_of_one_codebook_have_scales_of_their_own():
    convolution = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 7).view(
        -1, 1, 1, 1
    )
    (found,) = encode_together(["w"], [convolution], 9, 4, seed=0, importance=[None], row_scales=True)
    assert found.scales.shape == (6,)
    pair = encode_together(["a", "b"], [uneven(8), uneven(24)], 4, 8, seed=0, importance=[None] * 2, row_scales=True)
    assert [one.scales.shape for one in pair] == [(8,), (24,)]
    assert pair[0].centroids is pair[1].centroids


def test_the_same_seed_gives_the_same_bits():
    weight = uneven()
    one, other = (encode("w", weight, 4, 16, seed=3, row_scales=True) for _ in range(2))
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.centroids, other.centroids)
    assert torch.equal(one.scales, other.scales)


def test_a_weight_that_is_not_finite_is_refused():
    with refuses("w: the weight holds NaN or infinity"):
        encode("w", torch.tensor([[torch.nan, 1.0]]), 2, 1, row_scales=True)
