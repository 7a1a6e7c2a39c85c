"""k-means: the codebook of product quantization, against brute force and against fairseq's own EM."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_quant_noise.errors import UserError
from fairseq_quant_noise.pq.kmeans import Clustering, effective_centroids, kmeans


def normal(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def check(vectors: torch.Tensor, found: Clustering, n_centroids: int) -> None:
    """The contract of every clustering: shapes, dtypes, nearest centroids, and an honest error."""
    assert found.centroids.shape == (n_centroids, vectors.shape[1])
    assert found.centroids.dtype == torch.float32
    assert found.centroids.isfinite().all()
    assert found.codes.shape == (len(vectors),)
    assert found.codes.dtype == torch.uint8
    exact = vectors.float().double()
    distance = (exact[:, None] - found.centroids.double()).square().sum(2)  # (n, K)
    chosen = distance.gather(1, found.codes.long()[:, None])[:, 0]
    assert torch.allclose(chosen, distance.min(1).values, rtol=1e-9, atol=1e-12 * float(exact.square().max()))
    assert found.sse == pytest.approx(chosen.sum().item(), rel=1e-9, abs=1e-300)


def same(a: Clustering, b: Clustering) -> bool:
    return torch.equal(a.centroids, b.centroids) and torch.equal(a.codes, b.codes) and a.sse == b.sse


def fairseq_sse(vectors: torch.Tensor, n_centroids: int, seed: int) -> float:
    em_module = pytest.importorskip("fairseq.modules.quantization.pq.em")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        random.seed(seed)
        em = em_module.EM(vectors.t().contiguous(), n_centroids, n_iter=20, verbose=False)
        em.initialize_centroids()
        for i in range(20):
            em.step(i)
    return em.objective[-1] ** 2


@pytest.mark.parametrize(
    ("n_vectors", "n_centroids", "expected"),
    [
        (147456, 256, 256),
        (1024, 256, 256),
        (1023, 256, 128),
        (1023, 255, 255),
        (100, 256, 16),
        (100, 25, 25),
        (8, 256, 2),
        (4, 256, 1),
        (3, 256, 1),
        (1, 1, 1),
        (0, 256, 1),
    ],
)
def test_effective_centroids(n_vectors, n_centroids, expected):
    assert effective_centroids(n_vectors, n_centroids) == expected


@given(
    n=st.integers(1, 300),
    d=st.integers(1, 9),
    k=st.integers(1, 256),
    seed=st.integers(0, 9),
    levels=st.integers(1, 9),
)
@settings(max_examples=40, deadline=None)
def test_any_shape(n, d, k, seed, levels):
    """Coarse levels give many copies of a vector, hence ties and empty clusters."""
    vectors = (normal(n, d, seed) * levels).round()
    found = kmeans(vectors, k, iterations=5, seed=seed)
    check(vectors, found, k)
    if len(vectors.unique(dim=0)) <= k:
        assert found.sse == 0


@pytest.mark.upstream(9)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_error_at_most_fairseqs(seed):
    """Same objective, data and iterations: 64 x 128 at d = 4, 64 centroids."""
    vectors = normal(2048, 4, seed)
    assert kmeans(vectors, 64, seed=seed).sse <= fairseq_sse(vectors, 64, seed)


@pytest.mark.upstream(9)
def test_every_vector_counts():
    """More vectors than the seeding sample: at a fixed point each centroid is the mean of all of its vectors."""
    vectors = normal(20000, 2)
    found = kmeans(vectors, 4, iterations=500)
    means = torch.stack([vectors[found.codes == k].mean(0) for k in range(4)])
    assert torch.allclose(means, found.centroids, atol=1e-5)


def test_more_iterations_lower_the_error():
    vectors = normal(4000, 4)
    errors = [kmeans(vectors, 32, iterations=i).sse for i in (0, 2, 20)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > errors[2]


@given(n=st.integers(1, 300), d=st.integers(1, 9), k=st.integers(1, 64), seed=st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_by_weights_of_the_numbers(n, d, k, seed):
    """Nearest by the weights, and an honest error."""
    vectors, weights = (normal(n, d, seed) * 3).round(), normal(n, d, seed + 10).exp()
    found = kmeans(vectors, k, iterations=5, seed=seed, weights=weights)
    errors = (weights.double()[:, None] * (vectors.double()[:, None] - found.centroids.double()).square()).sum(2)
    chosen = errors.gather(1, found.codes.long()[:, None])[:, 0]  # (n,)
    assert torch.allclose(chosen, errors.min(1).values, rtol=1e-9, atol=1e-9)
    assert found.sse == pytest.approx(chosen.sum().item(), rel=1e-9, abs=1e-300)


def test_at_a_fixed_point_each_centroid_is_the_weighted_mean_of_its_vectors():
    vectors, weights = normal(20000, 2), normal(20000, 2, seed=1).exp()
    found = kmeans(vectors, 4, iterations=500, weights=weights)
    for k, centroid in enumerate(found.centroids):
        mine = found.codes == k
        mean = (weights[mine] * vectors[mine]).sum(0) / weights[mine].sum(0)
        assert torch.allclose(mean, centroid, atol=1e-5)


def test_weights_that_are_all_one_change_nothing_but_the_last_digits():
    vectors = normal(8000, 4)
    plain, ones = kmeans(vectors, 64), kmeans(vectors, 64, weights=torch.ones(8000, 4))
    assert ones.sse == pytest.approx(plain.sse, rel=1e-3)


def test_weights_lower_the_error_that_they_weigh():
    vectors, weights = normal(8000, 4), (2 * normal(8000, 4, seed=1)).exp()
    errors = []
    for found in (kmeans(vectors, 64, weights=weights), kmeans(vectors, 64)):
        errors.append(float((weights * (vectors - found.centroids[found.codes.long()]).square()).sum()))
    assert errors[0] < 0.8 * errors[1]


def test_codes_are_the_argmin():
    vectors = normal(4000, 4)
    check(vectors, kmeans(vectors, 256), 256)


def test_deterministic():
    vectors = normal(20000, 4)
    first = kmeans(vectors, 64, seed=3, iterations=5)
    assert same(first, kmeans(vectors.clone(), 64, seed=3, iterations=5))
    assert not same(first, kmeans(vectors, 64, seed=4, iterations=5))


def test_global_random_state_is_left_alone():
    torch.manual_seed(7)
    random.seed(7)
    before, before_python = torch.get_rng_state(), random.getstate()
    first = kmeans(normal(500, 4), 16)
    assert torch.equal(before, torch.get_rng_state())
    assert before_python == random.getstate()
    torch.manual_seed(8)
    assert same(first, kmeans(normal(500, 4), 16))


def test_input_is_left_alone():
    vectors = normal(500, 4).requires_grad_()
    before = vectors.detach().clone()
    found = kmeans(vectors, 16)
    assert not found.centroids.requires_grad
    assert torch.equal(before, vectors.detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    vectors = normal(500, 4).to(dtype)
    found = kmeans(vectors, 16)
    check(vectors, found, 16)
    assert same(found, kmeans(vectors.float(), 16))


def test_not_contiguous():
    vectors = normal(8, 500).t()
    assert same(kmeans(vectors, 16), kmeans(vectors.contiguous(), 16))


@pytest.mark.parametrize("n_centroids", [-1, 0, 4097])
def test_refuses_centroids(n_centroids):
    with pytest.raises(UserError, match="choose 1 to 4096") as caught:
        kmeans(normal(10, 2), n_centroids)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (4,), (2, 3, 4)])
def test_refuses_shapes(shape):
    with pytest.raises(UserError, match=r"give \(n, d\)"):
        kmeans(torch.zeros(shape), 4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_refuses_what_is_not_finite(value):
    vectors = normal(100, 4).double()
    vectors[50, 2] = value
    with pytest.raises(UserError, match="NaN/inf"):
        kmeans(vectors, 4)


@pytest.mark.upstream(13)
@pytest.mark.parametrize("n", [1, 2, 7, 100])
def test_more_centroids_than_vectors(n):
    vectors = normal(n, 4)
    found = kmeans(vectors, 256)
    assert found.sse == 0
    check(vectors, found, 256)


@pytest.mark.upstream(13)
@pytest.mark.parametrize("value", [0.0, -0.0, 0.1, 3e38, 1e-40])
def test_one_distinct_vector(value):
    vectors = torch.full((1000, 4), value)
    found = kmeans(vectors, 16)
    assert found.sse == 0
    assert torch.equal(found.centroids[found.codes.long()], vectors)


@pytest.mark.upstream(13)
def test_as_many_distinct_vectors_as_centroids():
    distinct = normal(64, 4)
    vectors = distinct[torch.randint(64, (20000,), generator=torch.Generator().manual_seed(1))]
    found = kmeans(vectors, 64)
    assert found.sse == 0
    assert torch.equal(found.centroids[found.codes.long()], vectors)


@pytest.mark.upstream(13)
def test_rare_vectors_that_the_sample_misses():
    """One vector 40,000 times and 63 others once: exact, though a sample cannot show them all."""
    vectors = torch.cat([torch.ones(40000, 4), normal(63, 4)])
    assert kmeans(vectors, 64).sse == 0
    # One centroid too few: at most the closest pair is merged, so nearly all of the 63 others are found.
    assert kmeans(vectors, 63).sse < 0.01 * (vectors - 1).square().sum().item()


@pytest.mark.upstream(13)
def test_empty_clusters_move_to_the_largest_errors():
    """100 distinct vectors beside 40,000 zeros, 64 centroids: each of them is used."""
    vectors = torch.cat([torch.zeros(40000, 4), normal(100, 4)])
    found = kmeans(vectors, 64)
    check(vectors, found, 64)
    assert len(found.codes.unique()) == 64


@pytest.mark.upstream(13)
@pytest.mark.parametrize("zeros", [0.9, 0.99, 0.999])
def test_mostly_zero_blocks(zeros):
    """As after Quant-Noise pruning: zero blocks cost nothing, and the others get the centroids."""
    kept = normal(20000, 4)[torch.rand(20000, generator=torch.Generator().manual_seed(0)) > zeros]
    vectors = torch.cat([torch.zeros(20000 - len(kept), 4), kept])
    found = kmeans(vectors, 256)
    check(vectors, found, 256)
    assert found.sse <= kmeans(kept, 250).sse * 1.05


@pytest.mark.upstream(13)
@pytest.mark.parametrize("size", [1e6, 1e18, 1e30])
def test_one_huge_outlier(size):
    """The outlier takes one centroid, and the others keep their precision."""
    vectors = normal(2000, 4)
    vectors[123] = size
    found = kmeans(vectors, 32)
    rest = torch.arange(2000) != 123
    assert torch.equal(found.centroids[found.codes[123].long()], vectors[123])
    assert found.sse <= kmeans(vectors[rest], 31).sse * 1.05


@pytest.mark.upstream(13)
def test_all_of_float32s_range():
    """Two far halves at the ends of float32: their squares and their sums stay finite."""
    vectors = torch.where(torch.arange(4000)[:, None] % 2 == 0, 1.0, -1.0) * (3e38 + 1e36 * normal(4000, 4))
    found = kmeans(vectors, 8)
    check(vectors, found, 8)
    assert found.sse <= 1.05 * kmeans(vectors / 2.0**100, 8).sse * 2.0**200


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_changes_nothing(scale):
    vectors = normal(500, 4)
    exact = 2.0 ** round(torch.tensor(scale).log2().item())  # a power of two rounds nothing
    assert torch.equal(kmeans(vectors, 16).codes, kmeans(vectors * exact, 16).codes)


def test_common_offset():
    """|| c ||^2 - 2 b.c around 1000 would cancel all of float32's digits of a spread of 0.01."""
    spread = normal(4000, 4) * 0.01
    vectors = spread + 1000.0
    found = kmeans(vectors, 64)
    check(vectors, found, 64)
    assert found.sse <= kmeans(vectors.double() - 1000.0, 64).sse * 1.02


# From given centroids


def sse(vectors: torch.Tensor, centroids: torch.Tensor) -> float:
    return (vectors[:, None].double() - centroids.double()).square().sum(2).min(1).values.sum().item()


@given(
    n=st.integers(1, 300),
    d=st.integers(1, 9),
    k=st.integers(1, 64),
    seed=st.integers(0, 9),
    iterations=st.integers(0, 5),
)
@settings(max_examples=40, deadline=None)
def test_from_given_centroids_the_error_is_not_above_theirs(n, d, k, seed, iterations):
    vectors, start = normal(n, d, seed), normal(k, d, seed + 100)
    before = start.clone()
    found = kmeans(vectors, k, iterations=iterations, start=start)
    check(vectors, found, k)
    assert found.sse <= sse(vectors, start) * (1 + 1e-6)
    assert torch.equal(start, before)
    assert same(found, kmeans(vectors, k, iterations=iterations, start=start))


def test_from_its_own_centroids_kmeans_finds_them_again():
    vectors = normal(2000, 4)
    first = kmeans(vectors, 16, iterations=500)
    again = kmeans(vectors, 16, iterations=5, start=first.centroids)
    assert torch.allclose(again.centroids, first.centroids, atol=1e-5)
    assert (again.codes == first.codes).float().mean() > 0.999


def test_a_warm_start_follows_vectors_that_moved_a_little():
    vectors = normal(4000, 4)
    old = kmeans(vectors, 64).centroids
    moved = vectors + 0.05 * normal(4000, 4, seed=1)
    warm = kmeans(moved, 64, iterations=5, start=old)
    assert warm.sse < sse(moved, old)
    assert warm.sse <= kmeans(moved, 64).sse * 1.03
    assert (warm.centroids - old).norm(dim=1).max() < 0.5


def test_a_warm_start_with_empty_clusters_puts_them_to_use():
    vectors = normal(1000, 4)
    start = torch.cat([normal(8, 4, seed=1), torch.full((8, 4), 100.0)])
    assert len(kmeans(vectors, 16, start=start).codes.unique()) == 16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    vectors = normal(20000, 4)
    found = kmeans(vectors.cuda(), 64)
    assert found.codes.is_cuda
    assert same(found, kmeans(vectors.cuda(), 64))
    assert found.sse == pytest.approx(kmeans(vectors, 64).sse, rel=1e-2)
