"""Time grids against published tables, and against the spacing that each one promises."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion import schedules, time_grids
from diffusion_jax.errors import ConfigError

RNG = np.random.default_rng(0)
# Karras et al. 2022, 18 steps, rho 7, .002..80.
EDM_SIGMAS = [
    80, 57.58598, 40.78557, 28.37458, 19.35245, 12.91008, 8.400935, 5.315195, 3.256822, 1.923340,
    1.088171, 0.5853481, 0.2964423, 0.1395165, 0.05994731, 0.02293452, 0.00752802, 0.002,
]  # fmt: skip


def noise_level(schedule, times):
    return schedule.sigma(times) / schedule.alpha(times)


@pytest.mark.parametrize("schedule", [schedules.edm(), schedules.linear_beta(0.1, 25.0)])
def test_karras_levels_are_the_published_ones(schedule):
    times = time_grids.karras(schedule, 18, 0.002, 80.0)
    assert times.dtype == np.float64
    assert len(times) == 19
    assert times[-1] == 0.0
    np.testing.assert_allclose(noise_level(schedule, times[:-1]), EDM_SIGMAS, rtol=1e-6)


def test_karras_without_final_zero_ends_at_sigma_min():
    schedule = schedules.rectified_flow()
    times = time_grids.karras(schedule, 17, 0.002, 80.0, final_zero=False)
    np.testing.assert_allclose(noise_level(schedule, times), EDM_SIGMAS, rtol=1e-6)


def test_exponential_levels_have_a_constant_ratio():
    schedule = schedules.cosine()
    times = time_grids.exponential(schedule, 9, 0.01, 30.0)
    levels = noise_level(schedule, times[:-1])
    np.testing.assert_allclose(levels[[0, -1]], [30.0, 0.01], rtol=1e-9)
    np.testing.assert_allclose(levels[1:] / levels[:-1], (0.01 / 30.0) ** (1 / 8), rtol=1e-9)


@pytest.mark.parametrize("name", ["cosine", "linear_beta", "rectified_flow", "sigmoid"])
def test_uniform_logsnr_has_equal_steps_and_keeps_its_ends(name):
    schedule = getattr(schedules, name)()
    start, end = RNG.uniform(0.8, 0.99), RNG.uniform(0.01, 0.2)
    times = time_grids.uniform_logsnr(schedule, 12, start, end)
    assert (times[0], times[-1]) == (start, end)
    steps = np.diff(schedule.logsnr(times))
    np.testing.assert_allclose(steps, steps.mean(), rtol=1e-8)


def test_shift_multiplies_the_noise_level_of_rectified_flow():
    schedule = schedules.rectified_flow()
    times = time_grids.uniform(10, 0.95, 0.05)
    moved = time_grids.shifted(times, 3.0)
    np.testing.assert_allclose(noise_level(schedule, moved), 3.0 * noise_level(schedule, times))
    np.testing.assert_array_equal(time_grids.shifted([1.0, 0.4, 0.0], 2.5)[[0, -1]], [1.0, 0.0])


def test_table_spacings_are_those_of_published_samplers():
    def entries(times):
        return (times[:-1] * 1000 - 1).round(9).tolist()

    leading = time_grids.leading(1000, 8, offset=1, final=1e-3)
    assert entries(leading) == [876, 751, 626, 501, 376, 251, 126, 1]
    assert leading[-1] == 1e-3
    assert entries(time_grids.trailing(1000, 8)) == [999, 874, 749, 624, 499, 374, 249, 124]
    assert entries(time_grids.linspace(1000, 8)) == [999, 856, 714, 571, 428, 285, 143, 0]
    dropped = time_grids.linspace(1000, 8, drop_last=True)
    assert entries(dropped) == [999, 874, 749, 624, 500, 375, 250, 125]
    full = time_grids.linspace(1000, 1000)
    np.testing.assert_allclose(full, time_grids.uniform(1000), atol=1e-15)


def test_beta_levels_are_quantiles():
    """The arcsine law, a = b = 1/2, has the quantile sin^2(pi p / 2); a = b = 1 is uniform."""
    schedule, (low, high) = schedules.linear_beta(0.1, 25.0), np.sort(RNG.uniform(0.01, 40.0, 2))
    p = np.linspace(1.0, 0.0, 9)
    for a, quantile in ((0.5, np.sin(0.5 * np.pi * p) ** 2), (1.0, p)):
        times = time_grids.beta(schedule, 9, low, high, a=a, b=a)
        assert times[-1] == 0.0
        expected = low + (high - low) * quantile
        np.testing.assert_allclose(noise_level(schedule, times[:-1]), expected, rtol=1e-8)
    # Of Stable Diffusion's table, as its sampler prints them.
    levels = noise_level(schedule, time_grids.beta(schedule, 8, 0.02916753, 14.614647)[:-1])
    published = [14.614647, 13.577006, 11.451765, 8.759599, 5.884216, 3.19205, 1.066808, 0.02916753]
    np.testing.assert_allclose(levels, published, rtol=1e-6)


def test_lu_lambdas_are_equal_steps_in_log_alpha_over_sigma():
    schedule = schedules.rectified_flow()
    times = time_grids.lu_lambdas(schedule, 7, 0.03, 15.0, final_zero=False)
    steps = np.diff(np.log(schedule.alpha(times) / schedule.sigma(times)))
    np.testing.assert_allclose(steps, np.log(15.0 / 0.03) / 7, rtol=1e-9)


def test_given_levels_and_timesteps_are_met():
    schedule = schedules.cosine()
    levels = np.sort(RNG.uniform(0.01, 50.0, 6))[::-1]
    np.testing.assert_allclose(
        noise_level(schedule, time_grids.given_sigmas(schedule, levels)), levels, rtol=1e-9
    )
    ended = time_grids.given_sigmas(schedule, [*levels, 0.0])
    assert ended[-1] == 0.0
    assert len(ended) == 7
    table = schedules.table(schedules.linear_betas(1000))
    times = time_grids.given_timesteps(1000, [999, 499, 0.5, 0], final=0.0)
    # alphabar[499] and alphabar[999] of the DDPM table.
    np.testing.assert_allclose(table.alpha(times[:2]) ** 2, [4.03583e-5, 0.0785872], rtol=1e-5)
    np.testing.assert_allclose(times[2:], [0.0015, 0.001, 0.0], rtol=1e-12)


def test_shifts_of_a_resolution():
    """Four times the pixels have half the uncertainty: sigma/alpha doubles."""
    assert time_grids.resolution_shift(4 * 256, 256) == pytest.approx(2.0)
    assert time_grids.dynamic_shift(256) == pytest.approx(np.exp(0.5))
    assert time_grids.dynamic_shift(4096) == pytest.approx(np.exp(1.15))
    middle = time_grids.dynamic_shift((256 + 4096) / 2)
    assert middle == pytest.approx(np.exp((0.5 + 1.15) / 2))
    shift, power, grid = RNG.uniform(0.3, 4.0), RNG.uniform(0.5, 2.0), time_grids.uniform(9)
    moved = time_grids.shifted(grid, shift, power=power)
    assert (moved[0], moved[-1]) == (1.0, 0.0)
    odds = moved[1:-1] / (1.0 - moved[1:-1])
    np.testing.assert_allclose(odds, shift * (grid[1:-1] / (1.0 - grid[1:-1])) ** power, rtol=1e-9)


def test_terminal_shift_keeps_ratios_and_ends_where_asked():
    times, terminal = np.append(np.sort(RNG.uniform(0.01, 1.0, 6))[::-1], 0.0), 0.17
    moved = time_grids.terminal_shifted(times, terminal)
    assert moved[-2] == pytest.approx(terminal, abs=1e-12)
    assert moved[-1] == 0.0
    ratios = (1.0 - moved[:-1]) / (1.0 - times[:-1])
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-9)


def test_numbers_of_any_library():
    five, np_five = time_grids.uniform(5), time_grids.uniform(np.int64(5), np.float32(1.0), 0)
    np.testing.assert_array_equal(five, np_five)
    for times in (jnp.asarray(five), [np.float32(t) for t in five], five.astype(np.float32)):
        given = time_grids.given(times)
        assert given.dtype == np.float64
        np.testing.assert_allclose(given, five, rtol=1e-6)
    np.testing.assert_array_equal(
        time_grids.trailing(np.int64(1000), np.int32(8)), time_grids.trailing(1000, 8)
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: time_grids.given([1.0, 0.5, 0.5, 0.0]), r"times\[2\]=0.5 does not lie below"),
        (lambda: time_grids.given([1.1, 0.5]), r"times\[0\]=1.1 lies outside \[0, 1\]"),
        (lambda: time_grids.given([1.0, np.nan]), r"times\[1\]=nan lies outside"),
        (lambda: time_grids.given([1.0]), r"shape \(1,\)"),
        (lambda: time_grids.uniform(0), "steps=0; expected at least 1"),
        (lambda: time_grids.leading(10, 11), "steps=11; expected between 1 and 10"),
        (lambda: time_grids.uniform_logsnr(schedules.cosine(), 5, 1.0, 0.1), "t_start=1.0"),
        (lambda: time_grids.uniform_logsnr(schedules.cosine(), 5, 0.9, 0.0), "t_end=0.0"),
        (lambda: time_grids.karras(schedules.edm(), 5, 0.002, 90.0), "the most is 80"),
        (lambda: time_grids.karras(schedules.edm(), 5, 3.0, 2.0), "sigma_min < sigma_max"),
        (lambda: time_grids.karras(schedules.edm(), 5, 0.1, 2.0, rho=0.0), "rho=0.0"),
        (lambda: time_grids.shifted([1.0, 0.0], -1.0), "shift=-1.0"),
        (lambda: time_grids.shifted([1.0, 0.0], 1.0, power=0.0), "power=0.0"),
        (lambda: time_grids.beta(schedules.edm(), 5, 0.1, 2.0, b=0.0), "b=0.0; expected"),
        (lambda: time_grids.beta(schedules.edm(), 5, 0.1, 90.0), "the most is 80"),
        (lambda: time_grids.given_sigmas(schedules.edm(), [2.0, 3.0, 0.0]), r"sigmas\[0\]=2.0"),
        (lambda: time_grids.given_sigmas(schedules.edm(), [2.0, -1.0]), r"sigmas\[1\]=-1.0"),
        (lambda: time_grids.given_sigmas(schedules.edm(), [90.0, 0.0]), r"sigmas\[0\]=90.0"),
        (lambda: time_grids.given_sigmas(schedules.edm(), [9.0]), r"sigmas has shape \(1,\)"),
        (lambda: time_grids.given_timesteps(10, [9, 9]), r"timesteps\[1\]=9.0"),
        (lambda: time_grids.given_timesteps(10, [10, 9]), r"timesteps\[0\]=10.0"),
        (lambda: time_grids.resolution_shift(0, 4), "size=0; expected a positive"),
        (lambda: time_grids.dynamic_shift(9, base_tokens=9, max_tokens=9), "base_tokens=9, max"),
        (lambda: time_grids.dynamic_shift(-1), "tokens=-1"),
        (lambda: time_grids.terminal_shifted([1.0, 0.5, 0.0], 1.0), "terminal=1.0"),
        (lambda: time_grids.terminal_shifted([1.0, 0.0], 0.5), "at least 3"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ConfigError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
