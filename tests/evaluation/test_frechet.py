"""Frechet distances against closed forms, their bias in n, and their error bars."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg

from diffusion_jax.errors import ConfigError
from diffusion_jax.evaluation import frechet
from diffusion_jax.evaluation.moments import Moments, MomentStream, error_of_parts, together


def law(seed, d, rank=None):
    random = np.random.default_rng(seed)
    root = random.normal(size=(d, rank or d)) / np.sqrt(d)
    return random.normal(size=d), root


def gaussian(seed, n, mean, root):
    return mean + np.random.default_rng(seed).normal(size=(n, root.shape[1])) @ root.T


def test_full_rank_equals_the_matrix_square_root():
    (m1, r1), (m2, r2) = law(0, 40), law(1, 40)
    a, b = (Moments.of(gaussian(k, 200, m, r)) for k, m, r in ((2, m1, r1), (3, m2, r2)))
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance).real
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance - 2 * root)
    np.testing.assert_allclose(frechet.frechet_distance(a, b), expected, rtol=1e-6)
    np.testing.assert_allclose(frechet.frechet_distance(b, a), expected, rtol=1e-6)


def test_commuting_covariances_have_a_closed_form():
    random = np.random.default_rng(0)
    basis = np.linalg.qr(random.normal(size=(12, 12)))[0]
    s1, s2 = random.uniform(0.1, 2, 12), random.uniform(0.1, 2, 12)
    s1[:3] = 0.0  # singular
    a, b = (
        Moments.given(np.full(12, k), (basis * s**2) @ basis.T, 9) for k, s in ((0, s1), (1, s2))
    )
    expected = 12 + ((s1 - s2) ** 2).sum()
    np.testing.assert_allclose(frechet.frechet_distance(a, b), expected, rtol=1e-10)


@pytest.mark.parametrize("smallest", [1e-4, 1e-6, 1e-8, 1e-12])
def test_full_rank_however_far_apart_the_variances_are(smallest):
    """The roots of small eigenvalues count: cutting them, or squaring first, is seen here."""
    d = 96
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(d, d)))[0]
    v1 = np.geomspace(1.0, smallest, d)
    v2 = np.geomspace(smallest, 1.0, d) if smallest > 1e-12 else 2.0 * v1
    a, b = (Moments.given(np.zeros(d), (basis * v) @ basis.T, 9) for v in (v1, v2))
    expected = ((np.sqrt(v1) - np.sqrt(v2)) ** 2).sum()
    np.testing.assert_allclose(frechet.frechet_distance(a, b), expected, rtol=1e-8)
    assert abs(frechet.frechet_distance(a, a)) < 1e-11 * v1.sum()


def test_near_singular_covariances_are_at_no_distance_from_themselves():
    """Features of fewer directions than dimensions: the roots of rounding do not add up."""
    mean, root = law(0, 300, rank=20)
    moments = Moments.of(1e3 * gaussian(1, 150, mean, root))
    scale = np.trace(moments.covariance)
    assert abs(frechet.frechet_distance(moments, moments)) < 1e-9 * scale
    moved = Moments(moments.count, moments.mean + 1.0, moments.scatter)
    np.testing.assert_allclose(frechet.frechet_distance(moments, moved), 300.0, rtol=1e-3)


def c4(n):
    """E[s]/sigma of the deviation s of n normal numbers."""
    return math.sqrt(2 / (n - 1)) * math.exp(math.lgamma(n / 2) - math.lgamma((n - 1) / 2))


def test_the_bias_of_few_samples_is_the_known_one():
    """In one dimension FD = (m1 - m2)^2 + (s1 - s2)^2, whose expectation is exact."""
    random, n, m, runs = np.random.default_rng(0), 12, 20, 4000
    values = []
    for _ in range(runs):
        x, y = 0.5 + 1.5 * random.normal(size=(n, 1)), random.normal(size=(m, 1))
        values.append(frechet.frechet_distance(Moments.of(x), Moments.of(y)))
    expected = 0.25 + 2.25 / n + 1 / m + 2.25 + 1 - 2 * 1.5 * c4(n) * c4(m)
    error = np.std(values) / math.sqrt(runs)
    assert abs(np.mean(values) - expected) < 3 * error < 0.1
    assert expected - (0.25 + 0.25) > 9 * error  # the bias itself is far outside


def test_the_limit_of_many_samples_has_no_bias_of_order_1_over_n():
    d, n, runs = 8, 400, 60
    mean, root = law(0, d)
    truth = Moments.given(mean, root @ root.T, 2)
    shifted = mean + 0.1
    plain, limit = [], []
    for seed in range(runs):
        parts = [Moments.of(part) for part in np.split(gaussian(seed, n, shifted, root), 10)]
        plain.append(frechet.frechet_distance(together(parts), truth))
        limit.append(frechet.frechet_infinity(parts, truth).value)
    exact = d * 0.01
    error = np.std(limit) / math.sqrt(runs)
    assert abs(np.mean(limit) - exact) < 3 * error < exact
    assert np.mean(plain) - exact > 5 * np.std(plain) / math.sqrt(runs)


@pytest.mark.parametrize("n", [60, 1000, 1024, 1100, 2100, 4096])
def test_error_bars_of_a_stream_are_the_deviation_of_repeated_samples(n):
    """Of both distances, whatever number of blocks the samples fill."""
    d, runs = 8, 80
    mean, root = law(0, d)
    truth = Moments.given(mean, root @ root.T, 2)
    plain, limit = [], []
    for seed in range(runs):
        stream = MomentStream()
        stream.add(gaussian(seed, n, mean + 0.3, root))
        sizes = [part.count for part in stream.parts()]
        assert max(sizes) - min(sizes) <= 1
        plain.append(frechet.frechet_estimate(stream.parts(), truth))
        limit.append(frechet.frechet_infinity(stream.parts(), truth))
    for found in (plain, limit):
        spread = np.std([f.value for f in found], ddof=1)
        told = np.sqrt(np.mean([f.standard_error**2 for f in found]))
        assert 0.75 < told / spread < 1.3
        assert found[0].n == n


@pytest.mark.parametrize("cycle", [5, 10, 100])
def test_classes_that_come_in_turn_are_in_every_part(cycle):
    """As of samples with the labels 0 to 9 again and again."""
    n, stream = 3000, MomentStream()
    classes = np.arange(n) % cycle
    stream.add(np.random.default_rng(0).normal(size=(n, 2)) + np.stack([classes, -classes], 1))
    means = np.stack([part.mean for part in stream.parts()])
    assert means.std(0, ddof=1).max() < 2.0 * cycle / math.sqrt(12 * n / 10) + 0.1


@pytest.mark.parametrize(("d", "sizes"), [(6, [60] * 10), (40, [128] * 9 + [8])])
def test_the_error_bar_is_the_deviation_of_repeated_samples(d, sizes):
    """Also where a part is smaller, without which FD is less biased than without another."""
    n, runs = sum(sizes), 80
    mean, root = law(0, d)
    truth = Moments.given(mean, root @ root.T, 2)
    found = []
    for seed in range(runs):
        x = gaussian(seed, n, mean + (0.3 if d < 10 else 0.05), root)
        parts = [Moments.of(part) for part in np.split(x, np.cumsum(sizes)[:-1])]
        found.append(frechet.frechet_estimate(parts, truth))
    spread = np.std([f.value for f in found], ddof=1)
    told = np.sqrt(np.mean([f.standard_error**2 for f in found]))
    assert 0.75 < told / spread < 1.3
    assert found[0].n == n


def test_the_error_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(0).normal(size=30)
    found = error_of_parts(np.ones(30), values - values.mean())
    np.testing.assert_allclose(found, values.std(ddof=1) / math.sqrt(30))
    assert error_of_parts([30], [0.0]) == math.inf


@pytest.mark.parametrize("n", [40, 400])
def test_the_error_bar_is_that_of_leaving_out_a_part_at_a_time(n):
    """Delete-a-group jackknife by hand, also for fewer samples than dimensions."""
    d = 48
    (m1, r1), (m2, r2) = law(0, d), law(1, d)
    truth = Moments.given(m2, r2 @ r2.T, 2)
    parts = [Moments.of(x) for x in np.array_split(gaussian(2, n, m1, r1), 10)]
    without = [
        frechet.frechet_distance(together(parts[:k] + parts[k + 1 :]), truth) for k in range(10)
    ]
    by_hand = math.sqrt(9 * np.var(without))
    found = frechet.frechet_estimate(parts, truth)
    np.testing.assert_allclose(found.standard_error, by_hand, rtol=0.1)
    whole = frechet.frechet_distance(together(parts), truth)
    np.testing.assert_allclose(found.value, whole, rtol=1e-9)


@pytest.mark.parametrize("n", [1, 9, 500, 1024, 5000])
def test_moments_are_the_same_bits_under_any_split(n):
    features = np.random.default_rng(0).normal(3.0, 0.1, (n, 7)).astype(np.float32)
    totals = []
    for cuts in ([n], [1] * n if n < 600 else [7] * (n // 7) + [n % 7], [n // 3, n - n // 3]):
        stream = MomentStream()
        start = 0
        for cut in cuts:
            stream.add(features[start : start + cut])
            start += cut
        totals.append(stream.total())
        assert sum(part.count for part in stream.parts()) == stream.count == n
    for other in totals[1:]:
        assert other.mean.tobytes() == totals[0].mean.tobytes()
        assert other.scatter.tobytes() == totals[0].scatter.tobytes()
    np.testing.assert_allclose(totals[0].mean, features.astype(np.float64).mean(0), rtol=1e-13)
    if n > 1:
        expected = np.cov(features.astype(np.float64), rowvar=False)
        np.testing.assert_allclose(totals[0].covariance, expected, rtol=1e-9, atol=1e-13)


def test_mistakes_are_one_line():
    one = Moments.of(np.zeros((1, 3)))
    two = Moments.of(np.eye(3))
    with pytest.raises(ConfigError, match="1 examples have no covariance; expected at least 2"):
        frechet.frechet_distance(one, two)
    with pytest.raises(ConfigError, match="features of 3 and 2 dimensions"):
        frechet.frechet_distance(two, Moments.of(np.eye(2)))
    with pytest.raises(ConfigError, match="3 samples: the limit of many needs at least 10"):
        frechet.frechet_infinity([two], two)
    with pytest.raises(ConfigError, match="no features"):
        MomentStream().total()
    with pytest.raises(ConfigError, match=r"x\.npz: holds arr_0; expected mu and sigma"):
        frechet.as_moments({"arr_0": np.zeros(3)}, "x.npz")
    with pytest.raises(ConfigError, match=r"mu has shape \(3,\) and sigma \(2, 2\)"):
        frechet.as_moments({"mu": np.zeros(3), "sigma": np.eye(2)}, "x.npz")
    found = frechet.as_moments({"mu": np.zeros(3), "sigma": 2 * np.eye(3)}, "x.npz")
    np.testing.assert_allclose(found.covariance, 2 * np.eye(3))
