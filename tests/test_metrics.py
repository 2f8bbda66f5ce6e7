"""Metrics against closed forms, NumPy loops, scipy, and the scatter that their errors promise."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from ddpm_jax.evaluation import metrics
from ddpm_jax.evaluation.metrics import (
    Statistics,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)


def gaussian(mean, covariance, count=10**6):
    return Statistics(np.float64(mean), np.float64(covariance), count)


def features_like(rng, n, dim=6):
    """Correlated features [n,dim] whose mean is far from 0."""
    mix = np.random.default_rng(9).normal(size=(dim, dim))
    return 50 + rng.normal(size=(n, dim)) @ mix


def test_statistics_are_numpys_mean_and_covariance_whatever_the_blocks(rng):
    x = np.float32(features_like(rng, 5000))
    ways = [x, [x[:1], x[1:7], x[7:7], x[7:]], iter(np.array_split(x, 13)), jnp.asarray(x)]
    for way in ways:
        mean, covariance, count = metrics.statistics(way)
        assert count == 5000 and covariance.dtype == np.float64
        np.testing.assert_allclose(mean, np.float64(x).mean(0), rtol=1e-13)
        np.testing.assert_allclose(
            covariance, np.cov(np.float64(x), rowvar=False), rtol=1e-10, atol=1e-10
        )


def test_a_large_mean_does_not_cancel_the_covariance(rng):
    x = rng.normal(size=(3000, 2)) + 1e8
    np.testing.assert_allclose(
        metrics.statistics(x).covariance, np.cov(x, rowvar=False), rtol=1e-7, atol=1e-9
    )


@pytest.mark.parametrize("s", [0.0, 0.5, 3.0])
def test_frechet_distance_of_round_gaussians(s):
    """N(0, I) and N(m, s^2 I): |m|^2 + D (1 - s)^2. s = 0 is a single point."""
    m = np.arange(5.0)
    a, b = gaussian(np.zeros(5), np.eye(5)), gaussian(m, s**2 * np.eye(5))
    assert frechet_distance(a, b) == pytest.approx(m @ m + 5 * (1 - s) ** 2, rel=1e-12)
    assert frechet_distance(b, a) == pytest.approx(m @ m + 5 * (1 - s) ** 2, rel=1e-12)


def test_frechet_distance_of_gaussians_that_share_their_axes(rng):
    """Commuting covariances: the squared differences of the standard deviations.

    Many of these deviations are 0 or close to it.
    """
    axes = np.linalg.qr(rng.normal(size=(40, 40)))[0]
    p, q = np.zeros(40), np.zeros(40)
    p[:25], q[10:35] = 10.0 ** -np.arange(25), rng.uniform(1, 2, 25)
    a, b = (gaussian(np.zeros(40), axes * s**2 @ axes.T) for s in (p, q))
    assert frechet_distance(a, b) == pytest.approx(np.square(p - q).sum(), rel=1e-7)
    assert frechet_distance(b, a) == pytest.approx(np.square(p - q).sum(), rel=1e-7)


def test_frechet_distance_is_that_of_scipys_matrix_root(rng):
    a, b = metrics.statistics(features_like(rng, 50)), metrics.statistics(rng.normal(size=(70, 6)))
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance)
    expected = np.square(a.mean - b.mean).sum() + np.trace(
        a.covariance + b.covariance - 2 * root.real
    )
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


def test_fewer_images_than_features_are_no_trouble(rng):
    """tr (C_a C_b)^(1/2) is then the sum of the singular values of X_a X_b^T (centred features)."""
    x, y = rng.normal(size=(20, 100)), rng.normal(size=(35, 100)) * 3 + 1
    a, b = metrics.statistics(x), metrics.statistics(y)
    product = (x - x.mean(0)) @ (y - y.mean(0)).T / np.sqrt(19 * 34)
    trace = (
        np.trace(a.covariance)
        + np.trace(b.covariance)
        - 2 * np.linalg.svd(product, compute_uv=False).sum()
    )
    expected = np.square(x.mean(0) - y.mean(0)).sum() + trace
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_fid_error_is_the_jackknife_computed_anew(rng):
    x, reference = np.float32(features_like(rng, 203)), metrics.statistics(features_like(rng, 500))
    group = np.arange(203) % 7
    left = [frechet_distance(metrics.statistics(x[group != g]), reference) for g in range(7)]
    expected = np.sqrt(6 / 7 * np.square(left - np.mean(left)).sum())
    assert metrics.fid_error(x, reference, groups=7) == pytest.approx(expected, rel=1e-8)
    assert metrics.fid_error(np.array_split(x, 31), reference, groups=7) == pytest.approx(
        expected, rel=1e-8
    )


def test_fid_error_is_the_scatter_over_fresh_images():
    """The tolerance is 6 standard errors of the scatter, whatever a version of NumPy draws."""
    reference = gaussian(np.zeros(3), np.eye(3))
    draws = [np.random.default_rng(i).normal(size=(400, 3)) * 1.3 + 0.2 for i in range(600)]
    scatter = np.std([frechet_distance(metrics.statistics(x), reference) for x in draws])
    typical = np.sqrt(np.mean([metrics.fid_error(x, reference) ** 2 for x in draws[:60]]))
    assert typical == pytest.approx(scatter, rel=0.2)


def test_inception_score_of_the_two_extremes():
    """All alike: 1. Sure of their class, all classes alike: K."""
    assert inception_score(np.zeros((60, 7), np.float32), splits=4) == pytest.approx(
        (1, 0), abs=1e-12
    )
    one_hot = np.tile(np.eye(10), (30, 1)) * 1e4
    assert inception_score(one_hot, splits=10) == pytest.approx((10, 0), abs=1e-9)


def test_inception_score_counts_every_image(rng):
    logits = rng.normal(size=(103, 5)) * 3
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    scores = []
    for i in range(4):
        part = p[i * 103 // 4 : (i + 1) * 103 // 4]
        scores.append(np.exp(np.mean([(q * np.log(q / part.mean(0))).sum() for q in part])))
    assert inception_score(logits, splits=4) == pytest.approx(
        (np.mean(scores), np.std(scores)), rel=1e-12
    )
    assert inception_score(logits, splits=1).std == 0


def mmd(x, y):
    """The unbiased squared MMD, pair by pair."""
    kernel = lambda a, b: (sum(a * b) / len(a) + 1) ** 3  # noqa: E731
    m = len(x)
    same = [kernel(z[i], z[j]) for z in (x, y) for i in range(m) for j in range(m) if i != j]
    return sum(same) / (m * (m - 1)) - 2 * np.mean([kernel(a, b) for a in x for b in y])


def test_kernel_distance_is_the_mean_of_the_loops(rng):
    x, y = rng.normal(size=(25, 3)), rng.normal(size=(17, 3)) + 1
    found = kernel_distance(x, y, subsets=6, subset_size=1000, seed=3)
    draw = lambda n, number: np.argsort(np.random.Philox(key=[3, number]).random_raw(n))[:8]  # noqa: E731
    values = [mmd(x[draw(25, 2 * i)], y[draw(17, 2 * i + 1)]) for i in range(6)]
    assert (found.mean, found.subset_std) == pytest.approx(
        (np.mean(values), np.std(values, ddof=1)), rel=1e-10
    )
    assert (
        found
        == kernel_distance(x, y, subsets=6, seed=3)
        != kernel_distance(x, y, subsets=6, seed=4)
    )


@pytest.mark.parametrize("size", [30, 60])
def test_kernel_distance_has_the_mean_and_the_error_it_says(size):
    """N(0, 1) and N(1, 1) in one dimension, by the moments 1, 3 and 15 in the cubic's expansion.

    The tolerances are 6 standard errors.
    """
    expected = 3 * 1**2 + 3 * (2 - 1) ** 2 + (1 + 3) ** 2
    found = []
    for i in range(300):
        draws = np.random.default_rng(i)
        found.append(
            kernel_distance(draws.normal(size=(300, 1)), draws.normal(size=(300, 1)) + 1, 20, size)
        )
    means, scatter = [each.mean for each in found], np.std([each.mean for each in found])
    assert np.mean(means) == pytest.approx(expected, abs=6 * scatter / np.sqrt(300))
    assert np.sqrt(np.mean([each.error**2 for each in found])) == pytest.approx(scatter, rel=0.35)


def radii(x, k):
    return [sorted(np.linalg.norm(x - row, axis=1))[k] for row in x]


def covered(queries, centres, k):
    reach = radii(centres, k)
    return np.mean([any(np.linalg.norm(centres - query, axis=1) <= reach) for query in queries])


@pytest.mark.parametrize("block", [2048, 16])
def test_precision_and_recall_are_those_of_the_loops(rng, monkeypatch, block):
    monkeypatch.setattr(metrics, "BLOCK", block)
    x, y = np.float32(rng.normal(size=(60, 2))), np.float32(rng.normal(size=(37, 2)) * 2 + 1)
    found = precision_recall(x, y, k=2)
    p, r = covered(y, x, 2), covered(x, y, 2)
    assert 0.1 < p < r < 1 and (found.precision, found.recall) == pytest.approx((p, r), abs=1e-12)
    errors = np.sqrt(p * (1 - p) / 37), np.sqrt(r * (1 - r) / 60)
    assert (found.precision_error, found.recall_error) == pytest.approx(errors, abs=1e-12)


def test_near_duplicates_far_from_zero_keep_their_distances(rng):
    """Distances of 0.05 between vectors of length 1e3.

    |x|^2 + |y|^2 - 2 x.y in float32 would lose them.
    """
    x = 300 + 1e-2 * rng.normal(size=(60, 16))
    y = 300 + 1e-2 * rng.normal(size=(60, 16)) * 1.2
    found = precision_recall(x, y)
    assert 0.05 < found.precision < 0.95
    assert (found.precision, found.recall) == pytest.approx(
        (covered(y, x, 3), covered(x, y, 3)), abs=1e-12
    )


def test_copies_lie_in_balls_of_radius_zero(rng):
    """Every image five times, and again with the float32 rounding of another batch.

    All distances are 0, and all images are covered.
    """
    x = np.repeat(np.float32(rng.normal(size=(9, 64))) + 5, 5, axis=0)
    y = x * np.float32(1 + 2e-7)
    assert precision_recall(x, y)[:2] == (1, 1)
    assert precision_recall(x, y + 1)[:2] == (0, 0)


def test_a_subset_of_the_modes_is_precise_and_does_not_recall(rng):
    modes = np.repeat([[0.0, 0.0], [100.0, 0.0]], 50, axis=0)
    x = modes + rng.normal(size=(100, 2))
    found = precision_recall(x, x[:50] + 1e-9)
    assert found[:2] == (1, 0.5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: metrics.statistics(x[0]), r"must be \[N,D\]"),
        (lambda x: metrics.statistics(x[:1]), "at least 2 images, got 1"),
        (lambda x: metrics.statistics([]), "at least 2 images, got 0"),
        (lambda x: metrics.statistics([x, x[:, :2]]), r"must be \[N,3\], got \[9, 2\]"),
        (lambda x: metrics.statistics(x / np.float64(x != x[0, 0])), "not finite"),
        (
            lambda x: frechet_distance(metrics.statistics(x), metrics.statistics(x[:, :2])),
            "3 and of 2 features",
        ),
        (
            lambda x: metrics.fid_error(x, metrics.statistics(x), groups=10),
            "9 images cannot be divided into 10",
        ),
        (lambda x: metrics.fid_error(x, metrics.statistics(x), groups=1), "at least 2"),
        (
            lambda x: metrics.fid_error(x[:2], metrics.statistics(x), groups=2),
            "at least 2 images, got 1",
        ),
        (lambda x: inception_score(x, splits=10), "from 1 to 9, the number of images"),
        (lambda x: kernel_distance(x[:3], x), "at least 4 images"),
        (lambda x: kernel_distance(x, x, subset_size=1), "at least 4 images"),
        (lambda x: kernel_distance(x, x[:, :2]), r"\[N,3\]"),
        (lambda x: precision_recall(x, x, k=9), "k: must be from 1"),
        (lambda x: precision_recall(x, x[:, :2]), r"\[N,3\]"),
    ],
)
def test_what_cannot_be_computed_is_refused(rng, call, words):
    with pytest.raises(ValueError, match=words), np.errstate(divide="ignore"):
        call(rng.normal(size=(9, 3)))
