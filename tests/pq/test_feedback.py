"""Error feedback: codes and centroids by what a layer's outputs lose."""

import pytest
import torch

from fairseq_quant_noise.pq import feedback
from fairseq_quant_noise.pq.encode import encode
from fairseq_quant_noise.pq.feedback import Layer, refined

D, K = 2, 8


def layer(seed=0, rows=48, inputs=16, mixed=True, weighted=True):
    """A weight whose inputs are correlated."""
    torch.manual_seed(seed)
    x = torch.randn(500, inputs, dtype=torch.float64)
    if mixed:
        x = x @ torch.randn(inputs, inputs, dtype=torch.float64)
    metric = x.t() @ x / len(x) + 0.05 * torch.eye(inputs)
    return Layer(torch.randn(rows, inputs), metric, torch.rand(rows) + 0.5 if weighted else torch.ones(rows))


def plain(of):
    found = encode("w", of.weight, D, K)
    return found.codes.long(), found.centroids


def loss(of, codes, centroids):
    return of.loss(centroids[codes.long()].view_as(of.weight) - of.weight)


def test_the_loss_is_that_of_the_outputs():
    of = layer(weighted=False)
    x = torch.linalg.cholesky(of.metric).t() * 16**0.5  # 16 inputs with these second moments
    errors = torch.randn(48, 16)
    torch.testing.assert_close(of.loss(errors), float((x @ errors.double().t()).square().sum() / 16), rtol=1e-5, atol=0)


def test_outputs_lose_less_than_by_k_means():
    of = layer()
    (codes,), centroids = refined([of], plain(of)[1])
    assert codes.shape == (48, 8)
    assert codes.dtype == torch.uint8
    assert loss(of, codes, centroids) < 0.6 * loss(of, *plain(of))


def test_codes_of_more_than_256_centroids_are_whole():
    of = layer(rows=400)
    centroids = torch.randn(300, D)
    (codes,), found = refined([of], centroids)
    assert codes.dtype == torch.int32
    assert int(codes.max()) > 255
    assert loss(of, codes, found) < loss(of, of.fed_back(centroids), centroids)


@pytest.mark.parametrize("step", ["feed back", "fit", "descend"])
def test_each_step_lowers_the_loss(step):
    of = layer(1)
    codes, centroids = plain(of)
    before = loss(of, codes, centroids)
    if step == "feed back":
        codes = of.fed_back(centroids)
    elif step == "fit":
        centroids = feedback._fitted([of], [codes], centroids)
    else:
        codes = of.descended(codes, centroids)
    assert loss(of, codes, centroids) < 0.98 * before


def test_the_last_column_takes_up_the_errors_of_the_first():
    """Where it lies without the first column's errors, found by direct minimization, decides its centroid."""
    of, centroids = layer(2, rows=30, inputs=4), plain(layer(2))[1]
    codes = of.fed_back(centroids)
    error = (centroids[codes[:, 0]] - of.weight[:, :D]).double()
    last = of.metric[D:, D:]
    best = of.weight[:, D:] - error @ of.metric[:D, D:] @ torch.linalg.inv(last)  # (30, D)
    root = torch.linalg.cholesky(last)
    assert torch.equal(codes[:, 1], torch.cdist(best @ root, centroids.double() @ root).argmin(1))
    assert not torch.equal(
        codes[:, 1], torch.cdist(of.weight[:, D:] @ root.float(), centroids @ root.float()).argmin(1)
    )


def test_fitted_centroids_solve_the_normal_equations(monkeypatch):
    monkeypatch.setattr(feedback, "STEPS", 200)
    monkeypatch.setattr(feedback, "RIDGE", 1e-9)
    of = layer(3)
    codes, centroids = plain(of)
    fitted = feedback._fitted([of], [codes], centroids)
    errors = fitted[codes].view_as(of.weight) - of.weight
    slope = torch.zeros(K, D).index_add_(0, codes.flatten(), of.slope(errors).reshape(-1, D))
    assert slope.abs().max() < 1e-3 * of.slope(of.weight).abs().max()


def test_one_codebook_fits_several_weights():
    both = [layer(4), layer(5, rows=16)]
    found = encode("w", torch.cat([of.weight for of in both]), D, K)
    parts = found.codes.split([48, 16])
    codes, centroids = refined(both, found.centroids)
    before = sum(loss(of, part, found.centroids) for of, part in zip(both, parts, strict=True))
    assert sum(loss(of, part, centroids) for of, part in zip(both, codes, strict=True)) < 0.6 * before


def test_the_same_input_gives_the_same_bits():
    (first, one), (second, other) = (refined([layer(6)], plain(layer(6))[1]) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(one, other)
