"""Solvers that add noise: churn, ancestral steps, distilled networks, and identities of theirs."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import gaussian_denoiser

from diffusion_jax.diffusion import schedules, solvers, time_grids
from diffusion_jax.diffusion.denoiser import Denoised
from diffusion_jax.errors import ConfigError

TIMES = np.array([1.0, 0.83, 0.55, 0.3, 0.12, 0.0])
COSINE, FLOW, EDM = schedules.cosine(), schedules.rectified_flow(), schedules.edm(sigma_max=20.0)
RNG = np.random.default_rng(11)
X, DRAWS = RNG.normal(size=(3, 4)), RNG.normal(size=(8, 3, 4))
STD = 0.6


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def replay(step, draw, shape):
    return DRAWS[step]


def states(name, schedule, times=TIMES, x=X, denoise=None, **options):
    def sample(x):
        solver = solvers.get(name)
        return solver(
            denoise or gaussian_denoiser(schedule), schedule, times, x, trajectory=True, **options
        )[1]

    return np.asarray(jax.jit(sample)(x))


def variances(name, schedule, times, std=STD, **options):
    """Of every state, exactly: linear in the start and in every draw, one example each."""
    steps = len(times) - 1
    x = np.eye(steps + 1, 1) * np.hypot(schedule.alpha(times[0]) * std, schedule.sigma(times[0]))
    unit = lambda step, draw, shape: np.eye(steps + 1, 1, -step - 1)  # noqa: E731
    path = states(
        name, schedule, times, x, gaussian_denoiser(schedule, 0.0, std), noise=unit, **options
    )
    return (path[..., 0] ** 2).sum(1)


@pytest.mark.parametrize("schedule", [COSINE, FLOW, EDM], ids=["cosine", "flow", "edm"])
def test_ancestral_euler_is_ddim_with_its_eta(schedule):
    eta = RNG.uniform(0.2, 0.9)
    for value in (eta, 1.0):
        expected = states("ddim", schedule, noise=replay, eta=value)
        actual = states("euler_ancestral", schedule, noise=replay, eta=value)
        np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("euler_ancestral", {"eta": 0.0}),
        ("tcd", {"gamma": 0.0}),
        ("flow_euler", {}),
        ("bdia", {"gamma": 0.0}),
        ("lms", {"order": 1}),
    ],
)
def test_without_noise_or_history_they_are_ddim(name, options):
    expected = states("ddim", COSINE)
    np.testing.assert_allclose(states(name, COSINE, **options), expected, rtol=1e-9, atol=1e-11)


def test_consistency_sampling_by_three_names():
    # gamma = 1 takes x0 and draws all noise anew, but ends at x0 itself.
    expected = states("lcm", FLOW, noise=replay, timestep_scaling=None)
    for name, options in (("tcd", {"gamma": 1.0}), ("flow_euler", {"renewal": 1.0})):
        actual = states(name, FLOW, noise=replay, **options)
        np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-12)
    state = X
    for k, (t, s) in enumerate(itertools.pairwise(TIMES)):
        state = (1.0 - s) * np.asarray(gaussian_denoiser(FLOW)(state, t)) + s * DRAWS[k]
    np.testing.assert_allclose(expected[-1], state, rtol=1e-10)


def test_the_boundary_condition_of_consistency_models():
    # At the table's first entry the estimate is the state; far from it, x0.
    schedule = schedules.table(schedules.scaled_linear_betas())
    zero = lambda x, t: Denoised(jnp.zeros_like(x))  # noqa: E731
    kept = states("lcm", schedule, [1 / 1000, 0.0], denoise=zero, noise=replay)[-1]
    np.testing.assert_allclose(kept, X, rtol=1e-9)
    # Entry 1 has tau = 10: c_skip = .25/100.25.
    part = states("lcm", schedule, [2 / 1000, 0.0], denoise=zero, noise=replay)[-1]
    np.testing.assert_allclose(part, X / 401.0, rtol=1e-9)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("euler", {"s_churn": 2.0}),
        ("heun", {"s_churn": 2.0, "coordinates": "sigma"}),
        ("kdpm2", {"s_churn": 2.0}),
        ("euler_ancestral", {}),
        ("kdpm2_ancestral", {}),
        ("flow_heun", {"eta": 0.7}),
        ("tcd", {"gamma": 0.4}),
    ],
)
def test_a_point_mass_keeps_its_marginals(name, options):
    # From pure noise, at every level, for noise that is exact.
    times = np.array([0.95, 0.7, 0.5, 0.3, 0.12])
    schedule = schedules.cosine() if name != "flow_heun" else FLOW
    expected = schedule.sigma(times) ** 2
    actual = variances(name, schedule, times, std=1e-9, **options)
    if name == "tcd":
        # The last step ends lower and adds none.
        expected[-1] = schedule.sigma(0.6 * times[-1]) ** 2
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "order"),
    [
        ("euler", {"s_churn": 5.0}, 1),
        ("heun", {"s_churn": 5.0}, 2),
        ("kdpm2", {"s_churn": 5.0}, 2),
        ("euler_ancestral", {}, 1),
        ("kdpm2_ancestral", {"eta": 0.5}, 1),
        ("flow_heun", {"eta": 0.5}, 1),
    ],
)
def test_the_variance_of_gaussian_data_is_approached(name, options, order):
    # Of churn below its cap, where gamma shrinks with the steps.
    std, errors = RNG.uniform(0.4, 0.8), []
    t, s = EDM.t_from_logsnr(np.array([-5.0, 5.0]))
    exact = std**2 + EDM.sigma(s) ** 2
    for steps in (40, 160):
        times = time_grids.uniform_logsnr(EDM, steps, t, s)
        errors.append(abs(variances(name, EDM, times, std, **options)[-1] - exact))
    assert np.log2(errors[0] / errors[1]) / 2 > order - 0.25, errors


def test_churn_is_that_of_algorithm_2():
    # Karras et al. 2022, in sigma itself; the cap, the range and s_noise all at work.
    sigmas = np.array([15.0, 6.0, 2.0, 0.5, 0.0])
    times = np.append(EDM.t_from_logsnr(-2 * np.log(sigmas[:-1])), 0.0)
    denoise, x = gaussian_denoiser(EDM), X * 15.0
    options = {"s_tmin": 1.0, "s_tmax": 10.0, "s_noise": 1.01}
    for churn in (0.8, 3.0):
        for name in ("euler", "heun"):
            state = x
            for k, (a, b) in enumerate(itertools.pairwise(sigmas)):
                gamma = min(churn / 4, np.sqrt(2) - 1) if 1.0 <= a <= 10.0 else 0.0
                hat = a + gamma * a
                state = state + np.sqrt(hat**2 - a**2) * 1.01 * DRAWS[k]

                def slope(x, sigma):
                    t = EDM.t_from_logsnr(-2 * np.log(sigma))
                    return (x - np.asarray(denoise(x, t))) / sigma

                first = slope(state, hat)
                end = state + (b - hat) * first
                if name == "heun" and b > 0:
                    end = state + (b - hat) * 0.5 * (first + slope(end, b))
                state = end
            actual = states(name, EDM, times, x, noise=replay, s_churn=churn, **options)[-1]
            np.testing.assert_allclose(actual, state, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("held", ["eps", "x0", "v", "edm"])
def test_a_prediction_held_over_the_noise_is_the_one_of_a_constant_network(held):
    # A network whose output is constant cannot tell whether the noise came before or after.
    sigma, end, churn, draw = 3.0, 1.0, 0.3, DRAWS[0]
    times = EDM.t_from_logsnr(-2 * np.log(np.array([sigma, end])))
    constant = RNG.normal(size=(3, 4))

    def x0(x, sigma, skip_sigma):
        if held == "eps":
            return x - sigma * constant
        if held == "x0":
            return constant
        if held == "v":
            root = np.sqrt(skip_sigma**2 + 1)
            return x / root**2 - skip_sigma / root * constant
        root = np.sqrt(sigma**2 + 0.25)
        return 0.25 * x / root**2 + 0.5 * sigma / root * constant

    hat = sigma * (1 + churn)
    noisy = X + np.sqrt(hat**2 - sigma**2) * draw
    expected = noisy + (end - hat) * (noisy - x0(noisy, hat, sigma)) / hat
    actual = states(
        "euler",
        EDM,
        times,
        denoise=lambda x, t: x0(x, sigma, sigma),
        noise=replay,
        s_churn=churn,
        held=held,
    )[-1]
    np.testing.assert_allclose(actual, expected, rtol=1e-10)


def test_noise_on_the_last_step_of_ddpm():
    # Over a table's last stretch the large variance is sigma_t^2, the small one the floor.
    schedule = schedules.table(schedules.linear_betas())
    ones = lambda step, draw, shape: np.ones(shape)  # noqa: E731
    fraction = RNG.uniform(size=(3, 4))

    def end(**options):
        zero = lambda x, t: Denoised(jnp.zeros_like(x), jnp.zeros_like(x), fraction)  # noqa: E731
        x, times = np.zeros((3, 4)), [0.1, 0.0]
        return states("ddpm", schedule, times, x, zero, noise=ones, **options)[-1]

    sigma = schedule.sigma(0.1)
    np.testing.assert_array_equal(end(variance="fixed_large"), 0.0)
    np.testing.assert_allclose(end(variance="fixed_large", final_noise=True), sigma)
    np.testing.assert_allclose(end(final_noise=True), 1e-10)
    learned = end(variance="learned_range", final_noise=True, min_variance=1e-8)
    np.testing.assert_allclose(learned, sigma**fraction * 1e-4 ** (1 - fraction), rtol=1e-9)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("euler", {"s_churn": -1.0}, "s_churn=-1.0; expected a number from 0"),
        ("heun", {"s_churn": np.inf}, "s_churn=inf"),
        ("kdpm2", {"s_churn": 1.0, "s_tmin": 2.0, "s_tmax": 1.0}, "s_tmin=2.0, s_tmax=1.0"),
        ("euler", {"s_churn": 1.0, "s_noise": -0.1}, "s_noise=-0.1"),
        ("euler", {"s_churn": 1.0}, "key=None; euler with s_churn > 0 draws noise"),
        ("euler", {"held": "velocity"}, "held"),
        ("euler_ancestral", {"eta": 1.1}, "eta=1.1; expected a number from 0"),
        ("kdpm2_ancestral", {"eta": -0.1}, "eta=-0.1"),
        ("flow_heun", {"eta": 2.0}, "eta=2.0"),
        ("flow_euler", {"renewal": 1.5}, "renewal=1.5"),
        ("tcd", {"gamma": -0.5}, "gamma=-0.5"),
        ("lcm", {"timestep_scaling": 0.0}, "timestep_scaling=0.0"),
        ("ddpm", {"min_variance": 0.0, "final_noise": True}, "min_variance=0.0"),
        ("ddim", {"stride": 0}, "stride=0"),
        ("ddpm", {"rounded": ([0.5], [0.5])}, r"rounded\[0\] has shape \(1,\); expected \(5,\)"),
        ("heun", {"coordinates": "sigma"}, "coordinates='sigma' divides by alpha"),
    ],
)
def test_bad_options_are_named(name, options, message):
    with pytest.raises(ConfigError, match=message) as error:
        solvers.get(name)(gaussian_denoiser(COSINE), COSINE, TIMES, X, **options)
    assert "\n" not in str(error.value)


def test_churn_beyond_a_schedule_is_refused():
    # A table ends with its last entry.
    schedule = schedules.table(schedules.linear_betas())
    with pytest.raises(ConfigError, match=r"s_churn=1.0 raises sigma/alpha at times\[0\]=1 to"):
        solvers.euler(
            gaussian_denoiser(schedule), schedule, [1.0, 0.5], X, noise=replay, s_churn=1.0
        )
