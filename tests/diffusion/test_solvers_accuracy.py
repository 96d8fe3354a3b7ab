"""Solvers against exact maps of Gaussian data, and their output variances."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from closed_forms import gaussian_denoiser

from diffusion_jax.diffusion import beta_tables, schedules, solvers, time_grids

RNG = np.random.default_rng(4)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize(
    "schedule", [schedules.linear_beta(), schedules.edm(), schedules.sigmoid()]
)
@pytest.mark.parametrize("name", ["heun", "dpmpp_2m"])
def test_gaussian_data_follow_the_exact_ode_map(schedule, name):
    mean, std = RNG.normal(), RNG.uniform(0.3, 0.9)
    times = time_grids.uniform_logsnr(schedule, 1000, 0.97, 0.1)
    x = RNG.normal(size=5)
    x_s = solvers.get(name)(gaussian_denoiser(schedule, mean, std), schedule, times, x)

    def marginal(t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return alpha * mean, np.sqrt(alpha**2 * std**2 + sigma**2)

    (mean_t, std_t), (mean_s, std_s) = marginal(0.97), marginal(0.1)
    np.testing.assert_allclose(x_s, mean_s + std_s * (x - mean_t) / std_t, rtol=2e-4)


def test_one_ddim_step_has_its_closed_factor():
    schedule, a, b, c = schedules.edm(), 5.0, 0.5, 0.7
    times = schedule.t_from_logsnr(-2 * np.log(np.array([a, b])))
    x = np.array([1.0, -2.0])
    x_s = solvers.ddim(gaussian_denoiser(schedule, 0.0, c), schedule, times, x)
    np.testing.assert_allclose(x_s / x, b / a + (1 - b / a) * c**2 / (c**2 + a**2), rtol=1e-9)
    np.testing.assert_allclose(x_s / x, 0.1173, atol=5e-5)


def output_variance(name, schedule, times, std, start_variance, **options):
    """Exact: with a linear denoiser the output is linear in the start and in every draw."""
    steps = len(times) - 1
    x = np.eye(steps + 1, 1)

    def unit(step, draw, shape):
        return np.eye(steps + 1, 1, -step - 1)

    end = solvers.get(name)(
        gaussian_denoiser(schedule, 0.0, std), schedule, times, x, noise=unit, **options
    )
    return float(end[0, 0] ** 2 * start_variance + (end[1:] ** 2).sum())


@pytest.mark.parametrize(
    ("variance", "expected"),
    [("small", [0.99107, 0.24613, 0.00928]), ("large", [0.99990, 0.25075, 0.01015])],
)
def test_ddpm_output_variance_with_the_exact_score(variance, expected):
    schedule = beta_tables.table(beta_tables.linear_betas())
    times = time_grids.uniform(1000)
    for data_variance, value in zip([1.0, 0.25, 0.01], expected, strict=True):
        std = np.sqrt(data_variance)
        actual = output_variance("ddpm", schedule, times, std, 1.0, variance=variance)
        np.testing.assert_allclose(actual, value, atol=6e-6)


@pytest.mark.parametrize("schedule", [schedules.cosine(), schedules.rectified_flow()])
def test_stochastic_solvers_approach_the_variance_of_the_data(schedule):
    std = RNG.uniform(0.4, 0.8)
    for order, at_least in [(1, 0.75), (2, 1.25)]:
        errors = [
            abs(output_variance("dpmpp_sde", schedule, times, std, 1.0, order=order) - std**2)
            for times in map(time_grids.uniform, (40, 160))
        ]
        assert np.log2(errors[0] / errors[1]) / 2 > at_least
