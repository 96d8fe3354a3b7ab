"""Heun's method: the coordinates of a call, written out by hand, and the accuracy they give."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import gaussian_denoiser, mixture_denoiser

from diffusion_jax.diffusion import schedules, solvers, time_grids

RNG = np.random.default_rng(3)
MEAN, STD = 0.4, 0.6
FROM_NOISE = {
    "cosine": schedules.cosine(),
    "flow": schedules.rectified_flow(),
    "shifted flow": schedules.rectified_flow(3.0),
    # alpha(1) = 4.9e-5, not 0.
    "table": schedules.table(schedules.cosine_betas()),
}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def test_rectified_flow_is_heun_on_the_velocity():
    # dx/dt = v = (x - x0)/t on every step, an Euler step into t = 0.
    schedule, x = schedules.rectified_flow(), RNG.normal(size=(3, 4))
    denoise, state, states = gaussian_denoiser(schedule, MEAN, STD), x, [x]
    times = [1.0, 0.83, 0.55, 0.3, 0.12, 0.0]

    def velocity(x, t):
        return (x - np.asarray(denoise(x, t))) / t

    for t, s in itertools.pairwise(times):
        first = velocity(state, t)
        predicted = state + (s - t) * first
        second = velocity(predicted, s) if s else first
        state = state + (s - t) * 0.5 * (first + second)
        states.append(state)
    actual = solvers.heun(denoise, schedule, times, x, trajectory=True)[1]
    np.testing.assert_allclose(actual, np.stack(states), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    ("schedule", "start", "flow"),
    [
        *((schedule, 1.0, True) for schedule in FROM_NOISE.values()),
        (schedules.cosine(), 0.9, False),
        (schedules.edm(), 1.0, False),
        (schedules.table(schedules.linear_betas()), 1.0, False),
    ],
)
def test_one_pair_of_coordinates_holds_for_all_steps(schedule, start, flow):
    # x/c over sigma/c, c = alpha + sigma or alpha; the slope is eps - x0 or eps.
    denoise, x = (
        gaussian_denoiser(schedule, MEAN, STD),
        RNG.normal(size=(3, 4)) * schedule.sigma(start),
    )
    times, state = start * np.array([1.0, 0.8, 0.5, 0.2]), x

    def levels(t):
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        c = alpha + sigma if flow else alpha
        return alpha, sigma, c, sigma / c

    def slope(x, t):
        alpha, sigma, *_ = levels(t)
        x0 = np.asarray(denoise(x, t))
        return (x - alpha * x0) / sigma - flow * x0

    for t, s in itertools.pairwise(times):
        (*_, c_t, u_t), (*_, c_s, u_s) = levels(t), levels(s)
        first = slope(state, t)
        predicted = c_s * (state / c_t + (u_s - u_t) * first)
        state = c_s * (state / c_t + 0.5 * (u_s - u_t) * (first + slope(predicted, s)))
    actual = solvers.heun(denoise, schedule, times, x)
    np.testing.assert_allclose(actual, state, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "schedule",
    [
        pytest.param(s, marks=pytest.mark.slow if i else [])
        for i, s in enumerate(FROM_NOISE.values())
    ],
    ids=FROM_NOISE,
)
def test_order_two_from_pure_noise(schedule):
    x = RNG.normal(size=20)

    def marginal(t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return alpha * MEAN, np.sqrt(alpha**2 * STD**2 + sigma**2)

    def error(name, steps, end):
        (mean_t, std_t), (mean_s, std_s) = marginal(1.0), marginal(end)
        exact = mean_s + std_s * (x - mean_t) / std_t
        times = time_grids.uniform(steps, end=end)
        x_s = solvers.get(name)(gaussian_denoiser(schedule, MEAN, STD), schedule, times, x)
        return np.sqrt(np.mean((np.asarray(x_s) - exact) ** 2))

    assert np.log2(error("heun", 20, 0.1) / error("heun", 160, 0.1)) / 3 >= 1.75
    # Few steps down to the data, where a bad first one would not be forgotten.
    assert error("heun", 20, 0.0) < 0.3 * error("euler", 20, 0.0)


def test_few_steps_keep_a_mixture_where_alpha_is_small_at_the_start():
    schedule, x = FROM_NOISE["table"], RNG.normal(size=2000)
    halves, means, stds = np.array([[0.5, 0.5], [-0.8, 0.7], [0.15, 0.15]])
    denoise = mixture_denoiser(schedule, halves, means, stds)
    exact = solvers.dpmpp_2m(denoise, schedule, time_grids.uniform(2000), jnp.asarray(x))
    error = {
        name: float(
            jnp.sqrt(jnp.mean((solver(denoise, schedule, time_grids.uniform(20), x) - exact) ** 2))
        )
        for name, solver in (("heun", solvers.heun), ("euler", solvers.euler))
    }
    assert error["heun"] < error["euler"] < 0.05
