"""Processes against Bayes' rule, the Chapman-Kolmogorov equation and numerical integration."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion import schedules
from diffusion_jax.diffusion.processes import Bernoulli, Binomial, Gaussian, Normal, Process

RNG = np.random.default_rng(1)
SCHEDULES = [
    schedules.cosine(),
    schedules.linear_beta(),
    schedules.edm(),
    schedules.rectified_flow(2.0),
]
PROCESSES = [Gaussian(schedules.cosine()), Gaussian(schedules.edm(), "large"), Binomial()]


def normal_density(x, mean, std):
    return np.exp(-0.5 * ((x - mean) / std) ** 2) / (std * np.sqrt(2 * np.pi))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gaussian_posterior_satisfies_bayes(schedule):
    # q(x_s | x_t, x0) q(x_t | x0) = q(x_s | x0) q(x_t | x_s) with the Markov kernel of two levels.
    t, s, (x0, x_s, x_t) = 0.7, 0.45, RNG.normal(size=3)
    alpha_t, sigma_t, alpha_s, sigma_s = (
        float(f(u)) for u in (t, s) for f in (schedule.alpha, schedule.sigma)
    )
    kernel = alpha_t / alpha_s
    kernel_std = np.sqrt(sigma_t**2 - kernel**2 * sigma_s**2)
    joint = normal_density(x_s, alpha_s * x0, sigma_s) * normal_density(
        x_t, kernel * x_s, kernel_std
    )
    posterior = Gaussian(schedule).posterior(np.array([x_t]), np.array([x0]), t, s)
    density = np.exp(posterior.log_prob(np.array([x_s])))
    np.testing.assert_allclose(
        density * normal_density(x_t, alpha_t * x0, sigma_t), joint, rtol=1e-9
    )
    large = Gaussian(schedule, "large").posterior(np.array([x_t]), np.array([x0]), t, s)
    np.testing.assert_allclose(large.std, kernel_std, rtol=1e-9)
    np.testing.assert_allclose(large.mean, posterior.mean)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("variance", ["small", "large"])
def test_gaussian_kl_is_the_integral(schedule, variance):
    process = Gaussian(schedule, variance)
    t, s = 0.6, 0.3
    x0, x_t, x0_hat = (np.array([v]) for v in RNG.normal(size=3))
    true = Gaussian(schedule).posterior(x_t, x0, t, s)
    model = process.posterior(x_t, x0_hat, t, s)
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    x_s = true.mean + true.std * nodes
    expected = (weights * (true.log_prob(x_s) - model.log_prob(x_s))).sum() / weights.sum()
    np.testing.assert_allclose(process.kl(x0, x_t, x0_hat, t, s), expected, rtol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gaussian_prior_kl_is_the_integral(schedule):
    process = Gaussian(schedule)
    x0 = RNG.normal(size=1)
    end = Normal(float(schedule.alpha(1.0)) * x0, float(schedule.sigma(1.0)))
    prior = process.prior((1,))
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    x_1 = end.mean + end.std * nodes
    difference = end.log_prob(x_1) - np.asarray(prior.log_prob(x_1))
    expected = (weights * difference).sum() / weights.sum()
    np.testing.assert_allclose(process.prior_kl(x0), expected, atol=2e-6)


@pytest.mark.parametrize("schedule", [schedules.cosine(), schedules.rectified_flow()])
def test_gaussian_steps_from_pure_noise_and_to_data(schedule):
    process = Gaussian(schedule)
    x_t, x0_hat = RNG.normal(size=(2, 4))
    first = process.posterior(x_t, x0_hat, 1.0, 0.8)
    np.testing.assert_allclose(first.mean, schedule.alpha(0.8) * x0_hat, atol=1e-12)
    np.testing.assert_allclose(first.std, schedule.sigma(0.8), rtol=1e-12)
    last = process.posterior(x_t, x0_hat, 0.2, 0.0)
    np.testing.assert_allclose(last.mean, x0_hat, rtol=1e-12)
    assert last.std == 0.0
    # The decoder of the last step is a density: it integrates to one over x0.
    x0 = np.linspace(-8, 8, 4001)
    density = np.exp(-process.kl(x0, np.zeros_like(x0), np.full_like(x0, 0.3), 0.2, 0.0))
    np.testing.assert_allclose(density.sum() * (x0[1] - x0[0]), 1.0, rtol=1e-6)
    assert np.all(process.kl(x0, x0, np.zeros_like(x0), 1.0, 0.8) >= 0.0)


def random_keep():
    rate = RNG.uniform(0.5, 2.0)
    return lambda t: (1.0 - t) ** rate


def test_binomial_marginal_follows_the_kernels():
    # Steps of the 2015 kernel B(x_t; x_{t-1} (1 - beta) + beta/2), beta = 1/(T - i + 1), composed.
    process, steps = Binomial(), 7
    probability = np.array([0.0, 1.0])
    for i in range(1, steps + 1):
        beta = 1.0 / (steps - i + 1)
        probability = probability * (1 - beta) + 0.5 * beta
        marginal = process.marginal(np.array([0.0, 1.0]), i / steps).mean
        np.testing.assert_allclose(marginal, probability, atol=1e-15)


def test_binomial_posterior_satisfies_bayes():
    keep = random_keep()
    process, (s, t) = Binomial(keep), np.sort(RNG.uniform(0.05, 0.95, 2))

    def kernel(later, earlier, kept):
        return kept * (later == earlier) + 0.5 * (1 - kept)

    for x0, x_t in itertools.product([0.0, 1.0], repeat=2):
        joint = [kernel(x_s, x0, keep(s)) * kernel(x_t, x_s, keep(t) / keep(s)) for x_s in (0, 1)]
        posterior = process.posterior(np.array([x_t]), np.array([x0]), t, s)
        np.testing.assert_allclose(posterior.mean, joint[1] / sum(joint), rtol=1e-12)


def test_binomial_kernel_marginalises_the_posterior_over_x0_hat():
    process = Binomial(random_keep())
    x_t, x0_hat = np.array([0.0, 1.0, 1.0]), RNG.uniform(size=3)
    one, zero = (process.posterior(x_t, np.full(3, b), 0.7, 0.4).mean for b in (1.0, 0.0))
    mixed = process.posterior(x_t, x0_hat, 0.7, 0.4).mean
    np.testing.assert_allclose(mixed, x0_hat * one + (1 - x0_hat) * zero, rtol=1e-12)


def test_binomial_kl_is_the_sum_over_bits_and_ends_in_the_log_likelihood():
    process = Binomial(random_keep())
    x0, x_t, x0_hat = np.array([1.0, 0.0, 1.0]), np.array([0.0, 0.0, 1.0]), RNG.uniform(size=3)
    q = process.posterior(x_t, x0, 0.6, 0.5).mean
    p = process.posterior(x_t, x0_hat, 0.6, 0.5).mean
    expected = q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p))
    np.testing.assert_allclose(process.kl(x0, x_t, x0_hat, 0.6, 0.5), expected, rtol=1e-12)
    last = process.kl(x0, x_t, x0_hat, 0.1, 0.0)
    np.testing.assert_allclose(last, -np.log(np.where(x0 == 1, x0_hat, 1 - x0_hat)), rtol=1e-12)


def test_binomial_kl_stays_finite_and_differentiable_when_certain():
    process, x0, x_t = Binomial(), jnp.array([0.0, 1.0, 1.0]), jnp.array([1.0, 0.0, 1.0])

    def loss(x0_hat):
        return process.kl(x0, x_t, x0_hat, 0.3, jnp.array(0.0)).sum()

    value, gradient = jax.value_and_grad(loss)(jnp.array([1.0, 0.0, 1.0]))
    np.testing.assert_allclose(value, 2 * np.log(2.0**24), rtol=1e-3)
    assert np.isfinite(gradient).all()
    assert np.isfinite(jax.grad(loss)(jnp.array([0.5, 0.1, 0.9]))).all()


def test_binomial_prior_is_a_fair_coin_reached_at_the_end():
    process = Binomial(random_keep())
    assert float(process.prior((3,)).mean[0]) == 0.5
    np.testing.assert_allclose(process.prior_kl(np.array([0.0, 1.0])), 0.0, atol=1e-15)
    early = Binomial(lambda t: 1.0 - 0.5 * t)
    # Bernoulli(3/4) against a fair coin.
    np.testing.assert_allclose(early.prior_kl(np.ones(1)), np.log(2) - 0.5623351446, rtol=1e-8)


@pytest.mark.parametrize("process", [*map(Gaussian, SCHEDULES), Binomial(lambda t: 1 - t**2)])
def test_forward_has_the_posterior_chain_s_moments(process):
    # x_s drawn by way of x_t has the law of x_s drawn from x0 directly.
    count = 40_000
    x0 = jnp.ones((count, 1))
    keys = jax.random.split(jax.random.key(3), 3)
    noise = [process.noise(k, x0.shape) for k in keys]
    by_way = process.posterior(process.forward(x0, 0.6, noise[0]), x0, 0.6, 0.4)
    chained = by_way.transform(noise[1])
    direct = process.forward(x0, 0.4, noise[2])
    spread = float(direct.std())
    assert abs(float(chained.mean() - direct.mean())) < 5 * spread / np.sqrt(count)
    assert abs(float(chained.std()) / spread - 1) < 0.03


@pytest.mark.parametrize("process", PROCESSES)
def test_one_time_per_example_equals_scalar_times(process):
    assert isinstance(process, Process)
    t, s = jnp.array([0.9, 0.5]), jnp.array([0.7, 0.0])
    x0, x_t = (jnp.asarray(RNG.integers(0, 2, (2, 3, 1)), jnp.float32) for _ in range(2))
    x0_hat = jnp.asarray(RNG.uniform(size=(2, 3, 1)), jnp.float32)
    noise = process.noise(jax.random.key(0), (2, 3, 1))
    batched = (
        process.forward(x0, t, noise),
        jnp.broadcast_to(process.posterior(x_t, x0_hat, t, s).mean, x_t.shape),
        process.kl(x0, x_t, x0_hat, t, s),
    )
    for i in range(2):
        one = slice(i, i + 1)
        ti, si = float(t[i]), float(s[i])
        single = (
            process.forward(x0[one], ti, noise[one]),
            process.posterior(x_t[one], x0_hat[one], ti, si).mean,
            process.kl(x0[one], x_t[one], x0_hat[one], ti, si),
        )
        for a, b in zip(batched, single, strict=True):
            np.testing.assert_allclose(a[one], b, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    "distribution",
    [Normal(np.array([0.5, -1.0]), np.array([2.0, 0.1])), Bernoulli(np.array([0.2, 0.7]))],
)
def test_samples_follow_the_distribution(distribution):
    draws = jax.vmap(distribution.sample)(jax.random.split(jax.random.key(0), 20_000))
    error = 4 * np.asarray(draws).std(0) / np.sqrt(20_000)
    assert (abs(np.asarray(draws).mean(0) - distribution.mean) < error).all()
    # Entropy: log_prob averages to minus it.
    entropy = -np.asarray(distribution.log_prob(np.asarray(draws, np.float64))).mean(0)
    if isinstance(distribution, Normal):
        expected = 0.5 * np.log(2 * np.pi * np.e * distribution.std**2)
    else:
        p = distribution.mean
        expected = -p * np.log(p) - (1 - p) * np.log(1 - p)
    np.testing.assert_allclose(entropy, expected, atol=0.03)


def test_gradient_of_the_gaussian_kl_survives_the_last_step():
    process = Gaussian(schedules.cosine())

    def loss(x0_hat):
        return process.kl(
            jnp.ones((2, 3)), jnp.ones((2, 3)), x0_hat, jnp.array([1.0, 0.1]), jnp.array([0.9, 0.0])
        ).sum()

    assert np.isfinite(jax.grad(loss)(jnp.full((2, 3), 0.3))).all()


@pytest.mark.parametrize("library", [np, jnp])
@pytest.mark.parametrize("dtype", [np.int32, bool])
@pytest.mark.parametrize("process", PROCESSES)
def test_whole_numbers_and_bits_are_computed_as_real_ones(process, dtype, library):
    bits, chances = RNG.integers(0, 2, (2, 2, 3)), RNG.uniform(size=(2, 3))
    t, s = np.array([0.7, 0.4]), np.array([0.5, 0.0])

    def results(dtype):
        x0, x_t = (library.asarray(b, dtype) for b in bits)
        other = library.asarray(chances, np.float32)
        yield process.forward(x0, t, other)
        yield process.posterior(x_t, other, t, s).mean
        yield process.posterior(x_t, x0, t, s).mean
        yield process.kl(x0, x_t, other, t, s)
        yield process.prior_kl(x0)
        if isinstance(process, Binomial):
            yield process.marginal(x0, t).mean

    for actual, expected in zip(results(dtype), results(np.float32), strict=True):
        assert library.issubdtype(actual.dtype, np.floating)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_numbers_of_the_host_widen_nothing():
    x, key = jnp.ones((2, 3), jnp.float32), jax.random.key(0)
    with jax.enable_x64(True):
        for process in PROCESSES:
            model = process.posterior(x, 0.5 * x, 0.5, np.float64(0.3))
            for value in (
                process.forward(x, np.float64(0.5), x),
                process.kl(x, x, 0.5 * x, 0.5, 0.3),
                process.kl(x, x, 0.5 * x, 0.5, 0.0),
                process.prior_kl(x),
                model.mean,
                model.log_prob(x),
            ):
                assert value.dtype == jnp.float32
        normal = Normal(x, schedules.cosine().sigma(0.5))
        for value in (normal.log_prob(x), normal.transform(x), normal.sample(key)):
            assert value.dtype == jnp.float32


def test_unknown_variance_is_named():
    with pytest.raises(ValueError, match="variance='medium' is unknown"):
        Gaussian(schedules.cosine(), "medium")
