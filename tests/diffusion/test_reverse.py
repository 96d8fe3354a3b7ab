"""Reverse kernels of learned variance: against quadrature, and on Gaussian data the whole bound."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit

from diffusion_jax.diffusion import likelihood, schedules, solvers, time_grids
from diffusion_jax.diffusion.denoiser import Denoised
from diffusion_jax.diffusion.processes import (
    Binomial,
    Gaussian,
    LearnedGaussian,
    Modelled,
    with_fraction,
    with_kernels,
)
from diffusion_jax.errors import ConfigError

SCHEDULE = schedules.linear_beta()
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(40)
WEIGHTS = WEIGHTS / WEIGHTS.sum()
STEPS = [(0.7, 0.6), (1.0, 0.4), (0.2, 0.01)]


@pytest.fixture
def numbers():
    rng = np.random.default_rng(3)
    x0, x_t, mean = rng.normal(size=(3, 5, 2))
    return x0, x_t, mean, rng.uniform(-0.7, 1.6, (5, 2))


def both(mean, fraction):
    return np.concatenate([mean, fraction], axis=-1)


@pytest.mark.parametrize(("t", "s"), STEPS)
def test_kl_is_the_quadrature_of_the_two_densities(numbers, t, s):
    x0, x_t, mean, fraction = numbers
    process = LearnedGaussian(SCHEDULE)
    q = Gaussian(SCHEDULE).posterior(x_t, x0, t, s)
    p = process.posterior(x_t, both(mean, fraction), t, s)
    expected = sum(
        w * (q.log_prob(x) - p.log_prob(x))
        for w, x in zip(WEIGHTS, (q.transform(np.full_like(x_t, n)) for n in NODES), strict=True)
    )
    found = process.kl(x0, x_t, both(mean, fraction), t, s)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_the_last_step_is_the_density_of_its_kernel(numbers):
    x0, x_t, mean, fraction = numbers
    process = LearnedGaussian(SCHEDULE)
    kernel = process.posterior(x_t, both(mean, fraction), 0.1, 0.0)
    np.testing.assert_allclose(kernel.mean, mean, rtol=1e-12)
    found = process.kl(x0, x_t, both(mean, fraction), 0.1, 0.0)
    np.testing.assert_allclose(found, -kernel.log_prob(x0), rtol=1e-12)
    assert (np.diff(np.sort(kernel.std.ravel())) > 0).all()


@pytest.mark.parametrize(("fraction", "variance"), [(0.0, "small"), (1.0, "large")])
@pytest.mark.parametrize(("t", "s"), STEPS)
def test_fractions_0_and_1_are_the_fixed_variances(numbers, t, s, fraction, variance):
    x0, x_t, mean, _ = numbers
    estimate = both(mean, np.full_like(mean, fraction))
    fixed, learned = Gaussian(SCHEDULE, variance), LearnedGaussian(SCHEDULE)
    np.testing.assert_allclose(
        learned.posterior(x_t, estimate, t, s).std, fixed.posterior(x_t, mean, t, s).std
    )
    np.testing.assert_allclose(
        learned.kl(x0, x_t, estimate, t, s), fixed.kl(x0, x_t, mean, t, s), rtol=1e-9
    )


def kernels(c):
    """x0_hat and f of the true reverse kernels of data N(0, c^2), for any step of `pairs`."""

    def estimate(x_t, t, s):
        a, b = SCHEDULE.alpha(t), SCHEDULE.sigma(t)
        a_s, b_s = SCHEDULE.alpha(s), SCHEDULE.sigma(s)
        total = a**2 * c**2 + b**2
        # The joint of x_s and x_t is Gaussian, with x_t = r x_s + noise.
        variance_s, r = a_s**2 * c**2 + b_s**2, a / a_s
        variance = variance_s - (r * variance_s) ** 2 / total
        fresh = 1.0 - (r * b_s / b) ** 2
        if b_s > 0:
            fraction = np.log(variance / (b_s**2 * fresh)) / np.log(b**2 / b_s**2)
        else:
            fraction = 1.0 + np.log(variance / b**2)
        return a * c**2 * x_t / total, fraction

    return estimate


def expected_bound(c, times, change=0.0, process=None):
    """E over data N(0, c^2) and noise; the terms are quadratic, so that quadrature is exact."""
    process = process or LearnedGaussian(SCHEDULE)
    x0, eps = (a.reshape(-1, 1) for a in np.meshgrid(c * NODES, NODES, indexing="ij"))
    share = np.outer(WEIGHTS, WEIGHTS).ravel()
    total = share @ likelihood.prior_term(process, x0)
    for t, s in itertools.pairwise(times):
        x_t = process.forward(x0, t, eps)
        mean, fraction = kernels(c)(x_t, t, s)
        estimate = mean
        if isinstance(process, LearnedGaussian):
            estimate = both(mean, np.full_like(mean, fraction + change))
        total += share @ likelihood.variational_term(process, x0, x_t, estimate, t, s)
    return total


@pytest.mark.parametrize("c", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("steps", [3, 10])
def test_with_the_true_variances_the_bound_is_the_entropy_at_any_number_of_steps(c, steps):
    entropy = 0.5 * np.log(2 * np.pi * np.e * c**2)
    times = time_grids.uniform(steps)
    # The prior differs from q(x_1): the only gap left is KL(q(x_1) || prior).
    end = SCHEDULE.alpha(1.0) ** 2 * c**2 + SCHEDULE.sigma(1.0) ** 2
    wide = SCHEDULE.alpha(1.0) ** 2 + SCHEDULE.sigma(1.0) ** 2
    gap = 0.5 * (end / wide - 1.0 - np.log(end / wide))
    assert expected_bound(c, times) == pytest.approx(entropy + gap, abs=1e-9)
    for change in (-0.3, 0.2):
        assert expected_bound(c, times, change) > entropy + gap + 1e-4
    if c < 1.0:
        assert expected_bound(c, times, process=Gaussian(SCHEDULE)) > entropy + gap + 1e-3


def test_ancestral_sampling_and_the_bound_over_learned_kernels():
    """At the true kernels the chain ends in the data's own distribution, its last draw included."""
    c, times = 0.5, time_grids.uniform(6)
    nexts = dict(itertools.pairwise(times))
    fractions = [kernels(c)(0.0, t, s)[1] for t, s in nexts.items()]
    at = np.asarray(times[:-1])[::-1]

    def denoise(x, t):
        a, b = SCHEDULE.alpha(t), SCHEDULE.sigma(t)
        fraction = jnp.interp(t, at, jnp.asarray(fractions)[::-1])
        x0 = a * c**2 * x / (a**2 * c**2 + b**2)
        return Denoised(x0, variance_fraction=jnp.full_like(x, fraction))

    process, asked = with_kernels(LearnedGaussian(SCHEDULE), denoise)
    start = jax.random.normal(jax.random.key(0), (20000, 1))

    @jit
    def run(start):
        x = solvers.ancestral(asked, process, times, start, key=jax.random.key(1))
        return x, likelihood.variational_bound(
            asked, process, times, x, key=jax.random.key(2)
        ).total

    x, bound = run(start)
    variance, n = float(jnp.var(x)), len(x)
    assert abs(variance - c**2) < 3 * c**2 * np.sqrt(2 / n)
    entropy, value = 0.5 * np.log(2 * np.pi * np.e * c**2), likelihood.estimate(bound)
    assert abs(value.value - entropy) < 3 * value.standard_error


def test_a_modelled_process_draws_noise_of_the_type_of_the_protocol():
    for process in (Gaussian(SCHEDULE), Modelled(Gaussian(SCHEDULE), lambda x, t: x)):
        with jax.enable_x64(True):
            assert process.noise(jax.random.key(0), (2,)).dtype == jnp.float32


def test_other_processes_pass_and_wrong_estimates_are_refused(numbers):
    x0, x_t, mean, _ = numbers
    for process in (Gaussian(SCHEDULE), Binomial()):
        assert with_kernels(process, abs) == (process, abs)
    with pytest.raises(ConfigError, match=r"x0_hat has shape \(5, 2\); expected \(5, 4\)"):
        LearnedGaussian(SCHEDULE).kl(x0, x_t, mean, 0.5, 0.4)
    words = "denoise gives variance_fraction=None.* with learned_variance=True"
    with pytest.raises(ConfigError, match=words):
        with_fraction(Denoised(mean))
    with pytest.raises(ConfigError, match="variance='small'; expected 'learned'"):
        LearnedGaussian(SCHEDULE, "small")
