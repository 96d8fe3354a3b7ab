"""The variational bound against entropies, closed gaps and enumeration."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion import schedules, time_grids
from diffusion_jax.diffusion.likelihood import (
    factorised_bound,
    prior_term,
    random_step,
    variational_bound,
    variational_term,
)
from diffusion_jax.diffusion.processes import Binomial, Gaussian
from diffusion_jax.errors import ConfigError

HEARTBEAT = np.array([[float(i % 5 == phase) for i in range(20)] for phase in range(5)])


def gaussian_estimate(schedule, x, t, std):
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    return alpha * std**2 * x / (alpha**2 * std**2 + sigma**2)


def exact_gaussian_bound(process, times, std):
    """E of the bound over N(0, std^2) data without its last step; the terms are quadratic."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(4)
    x0, noise = (a.ravel() * b for a, b in zip(np.meshgrid(nodes, nodes), (std, 1.0), strict=True))
    weights = np.outer(weights, weights).ravel() / weights.sum() ** 2
    total = (weights * process.prior_kl(x0)).sum()
    for t, s in itertools.pairwise(times[:-1]):
        x_t = process.forward(x0, t, noise)
        x0_hat = gaussian_estimate(process.schedule, x_t, t, std)
        total += (weights * process.kl(x0, x_t, x0_hat, t, s)).sum()
    return total


def least_gaussian_bound(schedule, times, std):
    """The same for the best model: what the last noisy state tells of x0, in nats."""
    snr = std**2 * schedule.alpha(times[-2]) ** 2 / schedule.sigma(times[-2]) ** 2
    return 0.5 * np.log1p(snr)


@pytest.mark.parametrize(
    ("std", "steps", "gap"),
    [(1.0, 10, 0.0), (1.0, 100, 0.0), (0.5, 10, 0.0769), (0.5, 100, 0.0108), (0.5, 1000, 0.0011)],
)
def test_gap_of_the_gaussian_bound(std, steps, gap):
    schedule = schedules.linear_beta(0.1, 20.0)
    times = time_grids.uniform(steps)
    bound = exact_gaussian_bound(Gaussian(schedule, "large"), times, std)
    assert abs(bound - least_gaussian_bound(schedule, times, std) - gap) < 6e-5


def test_random_data_never_pass_the_least_bound_and_approach_it():
    schedule, std = schedules.cosine(), np.random.default_rng(0).uniform(0.3, 1.5)
    gaps = []
    for steps in (20, 80):
        inner = time_grids.uniform_logsnr(schedule, steps, 0.995, 0.05)
        times = np.concatenate([[1.0], inner, [0.0]])
        bound = exact_gaussian_bound(Gaussian(schedule, "small"), times, std)
        gaps.append(bound - least_gaussian_bound(schedule, times, std))
    assert 0.0 < gaps[1] < 0.4 * gaps[0]


def test_estimated_gaussian_bound_is_above_the_entropy_by_little():
    schedule, std, count = schedules.linear_beta(), 0.6, 2000
    process, times = Gaussian(schedule, "large"), time_grids.uniform(100)
    x0 = std * jax.random.normal(jax.random.key(0), (count, 2))
    bound = variational_bound(
        lambda x, t: gaussian_estimate(schedule, x, t, std),
        process,
        times,
        x0,
        key=jax.random.key(1),
    )
    assert bound.steps.shape == (100, count)
    # Against the exact log-density of the same examples, which removes most of the spread.
    density = -0.5 * (x0 / std) ** 2 - 0.5 * np.log(2 * np.pi * std**2)
    excess = np.asarray(bound.total + density.sum(1))
    error = excess.std() / np.sqrt(count)
    assert -3 * error < excess.mean() < 0.15 + 3 * error


def test_replayed_noise_gives_the_terms_one_by_one():
    process, times = Binomial(), time_grids.uniform(4)
    x0 = jnp.array([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    draws = np.random.default_rng(0).uniform(size=(4, 2, 3)).astype(np.float32)
    bound = variational_bound(
        lambda x, t: 0.2 + 0.5 * x, process, times, x0, noise=lambda step, draw, shape: draws[step]
    )
    for k, (t, s) in enumerate(itertools.pairwise(times)):
        x_t = process.forward(x0, t, draws[k])
        # At s=0 this is the cross-entropy of the bits.
        x0_hat = 0.2 + 0.5 * x_t
        if s == 0.0:
            expected = -jnp.log(jnp.where(x0 == 1.0, x0_hat, 1.0 - x0_hat)).sum(1)
        else:
            expected = process.kl(x0, x_t, x0_hat, t, s).sum(1)
        np.testing.assert_allclose(bound.steps[k], expected, rtol=1e-4)
    np.testing.assert_allclose(bound.prior, 0.0, atol=1e-7)
    np.testing.assert_allclose(bound.total, bound.prior + bound.steps.sum(0))


@pytest.mark.slow
def test_one_random_step_estimates_the_whole_bound():
    process, times, count = Binomial(), time_grids.uniform(8), 60_000
    x0 = jnp.tile(jnp.array([[1.0, 0.0]]), (count, 1))
    keys = jax.random.split(jax.random.key(0), 3)
    t, s = random_step(times, jax.random.uniform(keys[0], (count,)))
    x_t = process.forward(x0, t, process.noise(keys[1], x0.shape))
    terms = 8 * variational_term(process, x0, x_t, 0.2 + 0.5 * x_t, t, s) + prior_term(process, x0)
    whole = variational_bound(lambda x, t: 0.2 + 0.5 * x, process, times, x0[:4000], key=keys[2])
    error = np.hypot(terms.std() / np.sqrt(count), whole.total.std() / np.sqrt(4000))
    assert abs(float(terms.mean() - whole.total.mean())) < 3 * error


def test_random_steps_cover_the_grid_evenly():
    times = np.array([1.0, 0.7, 0.3, 0.0])
    t, s = random_step(
        times, jnp.array([0.0, 0.3, 0.34, 0.6, 0.67, np.nextafter(np.float32(1), 0)])
    )
    np.testing.assert_allclose(t, [1.0, 1.0, 0.7, 0.7, 0.3, 0.3], rtol=1e-6)
    np.testing.assert_allclose(s, [0.7, 0.7, 0.3, 0.3, 0.0, 0.0], rtol=1e-6)


def brute_force_bound(sequences, steps):
    """The same expectation over all 2^bits states, with the kernels written out as matrices."""
    count, bits = sequences.shape
    states = np.array(list(itertools.product([0, 1], repeat=bits)))
    total = 0.0
    for i in range(steps, 0, -1):
        keep_t, keep_s = 1 - i / steps, 1 - (i - 1) / steps
        marginal_t, marginal_s, kernel = (
            0.5 * (1 - k) + k * np.eye(2) for k in (keep_t, keep_s, keep_t / keep_s)
        )
        # joint[m, x]: sequence m and noisy state x.
        joint = np.prod(marginal_t[sequences[:, None].astype(int), states[None]], -1) / count
        x0_hat = (joint / joint.sum(0)).T @ sequences
        for m, x in itertools.product(range(count), range(len(states))):
            for bit in range(bits):
                x_t = states[x, bit]
                both = marginal_s * kernel[:, x_t]  # [x0, x_s]
                posterior = both / both.sum(1, keepdims=True)
                model = np.array([1 - x0_hat[x, bit], x0_hat[x, bit]]) @ posterior
                true = posterior[int(sequences[m, bit])]
                used = true > 0
                total += joint[m, x] * (true[used] * np.log(true[used] / model[used])).sum()
    return total


def test_factorised_bound_equals_enumeration_of_all_states():
    sequences = np.array([[1, 1, 0, 0, 1.0], [0, 0, 1, 1, 1.0], [0, 0, 0, 0, 0.0]])
    for steps in (2, 5):
        actual = factorised_bound(sequences, Binomial(), time_grids.uniform(steps))
        np.testing.assert_allclose(actual, brute_force_bound(sequences, steps), rtol=1e-9)


def test_chances_count_like_sequences_that_are_repeated():
    sequences, times = np.array([[1, 1, 0.0], [0, 0, 1.0]]), time_grids.uniform(3)
    repeated = factorised_bound(sequences[[0, 0, 0, 1]], Binomial(), times)
    weighted = factorised_bound(sequences, Binomial(), times, np.array([0.75, 0.25]))
    np.testing.assert_allclose(weighted, repeated, rtol=1e-12)
    assert weighted < factorised_bound(sequences, Binomial(), times) - 0.05


def test_heartbeat_floor_falls_like_one_over_steps_towards_the_entropy():
    gaps = []
    for steps in (20, 50, 100, 200):
        bound = factorised_bound(HEARTBEAT, Binomial(), time_grids.uniform(steps))
        gaps.append(bound / np.log(2) - np.log2(5))
    np.testing.assert_allclose(gaps, [0.28, 0.11, 0.04, 0.02], atol=0.025)
    np.testing.assert_allclose(np.array(gaps) * [20, 50, 100, 200], 5.0, rtol=0.05)


def test_heartbeat_estimate_agrees_with_the_exact_bound():
    process, times, count = Binomial(), time_grids.uniform(50), 1500
    x0 = jnp.asarray(HEARTBEAT, jnp.float32)[np.arange(count) % 5]
    sequences = jnp.asarray(HEARTBEAT, jnp.float32)

    def denoise(x, t):
        log_joint = process.marginal(sequences, t).log_prob(x[:, None, :]).sum(-1)
        return jax.nn.softmax(log_joint) @ sequences

    bound = jax.jit(
        lambda x0: variational_bound(denoise, process, times, x0, key=jax.random.key(0))
    )
    total = np.asarray(bound(x0).total)
    exact = factorised_bound(HEARTBEAT, process, times)
    assert abs(total.mean() - exact) < 3 * total.std() / np.sqrt(count)
    assert total.mean() > np.log(5)


def test_data_without_structure_have_no_floor():
    # Independent fair bits: factorised kernels are exact, at any number of steps.
    sequences = np.array(list(itertools.product([0.0, 1.0], repeat=4)))
    for steps in (1, 3):
        bound = factorised_bound(sequences, Binomial(), time_grids.uniform(steps))
        np.testing.assert_allclose(bound, 4 * np.log(2), rtol=1e-12)


def test_too_many_states_are_refused():
    sequences = np.random.default_rng(0).integers(0, 2, (30, 30)).astype(float)
    with pytest.raises(ConfigError, match=r"sequences have .* distinguishable noisy states"):
        factorised_bound(sequences, Binomial(), time_grids.uniform(2))
