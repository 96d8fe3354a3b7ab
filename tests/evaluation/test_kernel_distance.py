"""Kernel distances against closed forms of Gaussians."""

from __future__ import annotations

import math

import numpy as np
import pytest

from diffusion_jax.errors import ConfigError
from diffusion_jax.evaluation import kernel_distance as kernels


def moments(mean, std):
    """E x^i of a normal number, i = 1, 2, 3."""
    return np.array([mean, mean**2 + std**2, mean**3 + 3 * mean * std**2])


def test_kid_of_one_dimension_is_a_sum_over_moments():
    """(x y + 1)^3 is a product of powers: MMD^2 = sum_i C(3, i) (E x^i - E y^i)^2."""
    random = np.random.default_rng(0)
    x, y = 0.3 + 0.8 * random.normal(size=(40_000, 1)), random.normal(size=(40_000, 1))
    expected = float(np.array([3, 3, 1]) @ (moments(0.3, 0.8) - moments(0.0, 1.0)) ** 2)
    found = kernels.kid(x, y, size=500)
    assert abs(found.value - expected) < 3 * found.standard_error < 0.3 * expected
    same = kernels.kid(random.normal(size=(20_000, 1)), y[:20_000], size=500)
    assert abs(same.value) < 3 * same.standard_error


def test_the_gaussian_kernel_has_a_closed_form():
    random, s, d = np.random.default_rng(1), kernels.CMMD_SIGMA, 3
    x, y = 4.0 + 6.0 * random.normal(size=(8000, d)), 5.0 * random.normal(size=(8000, d))

    def mean_kernel(apart, variance):
        width = s**2 + variance
        return (s**2 / width) ** (d / 2) * math.exp(-d * apart**2 / (2 * width))

    expected = mean_kernel(0, 72.0) + mean_kernel(0, 50.0) - 2 * mean_kernel(4.0, 61.0)
    found = kernels.kernel_distance(kernels.gaussian, x, y, 1000)
    assert abs(found.value - expected) < 3 * found.standard_error < 0.5 * expected


def test_cmmd_looks_at_directions_alone():
    random = np.random.default_rng(2)
    x, y = random.normal(size=(400, 5)) + 1.0, random.normal(size=(400, 5))
    lengths = random.uniform(0.1, 10.0, (400, 1))
    np.testing.assert_allclose(kernels.cmmd(lengths * x, y), kernels.cmmd(x, y), rtol=1e-9)
    assert kernels.cmmd(x, y).value > 10 * kernels.cmmd(x, y).standard_error


def test_no_bias_and_an_honest_error_bar():
    random, runs = np.random.default_rng(3), 1000
    found = [kernels.kid(*(0.4 * random.normal(size=(2, 200, 2))), size=50) for _ in range(runs)]
    values = np.array([f.value for f in found])
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(runs)
    told = np.sqrt(np.mean([f.standard_error**2 for f in found]))
    assert 0.8 < told / values.std() < 1.25


def test_too_few_are_refused():
    with pytest.raises(
        ConfigError, match=r"9 samples, 50 of the reference: .* at least 10 of each"
    ):
        kernels.kid(np.zeros((9, 2)), np.zeros((50, 2)))
