"""Time sampling: the distributions of the noise level, by their quantiles."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffusion_jax.diffusion import schedules
from diffusion_jax.diffusion.time_sampling import (
    TIME_SAMPLINGS,
    log_normal,
    logit_normal,
    stratified,
    uniform,
)

U = (np.arange(2000) + 0.5) / 2000


@pytest.mark.parametrize("make", ["edm", "rectified_flow", "linear_beta", "cosine"])
def test_log_normal_noise_levels(make: str) -> None:
    """log(sigma / alpha) is N(mean, std^2) whatever the schedule."""
    schedule = schedules.SCHEDULES[make]()
    with jax.enable_x64(True):
        t = np.asarray(log_normal(jnp.asarray(U), schedule, mean=-0.8, std=0.9))
    noise = -0.5 * schedule.logsnr(t)
    np.testing.assert_allclose(noise, stats.norm.ppf(U, -0.8, 0.9), rtol=1e-8, atol=1e-8)


def test_log_normal_is_not_clipped_to_the_sampling_range() -> None:
    schedule = schedules.edm(sigma_min=0.1, sigma_max=1.0)
    t = log_normal(jnp.asarray(U, jnp.float32), schedule)
    sigma = schedule.sigma(np.asarray(t))
    assert np.mean(sigma < 0.1) == pytest.approx(stats.norm.cdf(np.log(0.1), -1.2, 1.2), abs=1e-3)
    assert np.mean(sigma > 1.0) == pytest.approx(stats.norm.sf(0.0, -1.2, 1.2), abs=1e-3)
    assert np.max(t) > 1.0


def test_a_table_holds_at_its_end() -> None:
    t = log_normal(jnp.array([0.5, 0.9999]), schedules.table([0.1, 0.2]), mean=0.0)
    assert t[1] == 1.0


def test_logit_normal_times() -> None:
    t = logit_normal(jnp.asarray(U, jnp.float32), schedules.rectified_flow(), mean=0.5, std=1.3)
    assert stats.kstest(stats.logistic.ppf(np.asarray(t)), stats.norm(0.5, 1.3).cdf)[0] < 1e-3


@pytest.mark.parametrize("sampling", [log_normal, logit_normal])
@pytest.mark.parametrize("std", [0.0, -1.0, float("nan")])
def test_a_std_that_is_not_positive_is_refused(sampling: Any, std: float) -> None:
    with pytest.raises(ValueError, match=f"^std={std}; expected a positive number$"):
        sampling(jnp.array([0.2]), schedules.edm(), std=std)


def test_uniform_times_are_the_numbers() -> None:
    u = jnp.array([0.2, 0.7])
    np.testing.assert_array_equal(uniform(u, schedules.edm()), u)


@pytest.mark.parametrize("name", TIME_SAMPLINGS)
def test_generators_that_return_0_give_finite_times(name: str) -> None:
    schedule = schedules.edm()
    t = jax.jit(lambda u: TIME_SAMPLINGS[name](u, schedule))(jnp.array([0.0, 1.0 - 2**-24]))
    assert np.all(np.isfinite(t))
    assert t[1] > t[0] >= 0.0


def test_stratified_fills_every_cell_once() -> None:
    batch = 97
    u = jax.random.uniform(jax.random.key(0), (batch,))
    order = np.random.default_rng(0).permutation(batch)
    cells = stratified(u, order / batch, batch)
    assert cells.dtype == jnp.float32
    np.testing.assert_array_equal(np.floor(np.asarray(cells) * batch), order)
    # Within its cell a number is as uniform as it was.
    np.testing.assert_allclose(np.asarray(cells) * batch - order, u, atol=1e-4)


def test_stratified_stays_below_one() -> None:
    largest = jnp.float32(1.0 - 2**-24)
    cells = stratified(jnp.full(128, largest), jnp.arange(128) / 128, 128)
    assert cells.max() < 1.0


def test_stratified_batches_of_several_processes_are_one_batch() -> None:
    u = jax.random.uniform(jax.random.key(1), (8,))
    whole = stratified(u, jnp.arange(8) / 8, 8)
    parts = [stratified(u[p::2], jnp.arange(8)[p::2] / 8, 8) for p in range(2)]
    np.testing.assert_array_equal(np.stack(parts, axis=1).ravel(), whole)
