"""Tables of betas: published constants, exact nodes, and what lies between and beyond them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion import schedules

TABLES = {
    "linear": schedules.linear_betas(),
    "scaled_linear": schedules.scaled_linear_betas(),
    "cosine": schedules.cosine_betas(),
    "zero_snr": schedules.zero_terminal_snr(schedules.scaled_linear_betas()),
    "two": np.array([0.1, 0.3]),
}


def test_published_constants() -> None:
    linear = schedules.table(schedules.linear_betas()).alphabars
    np.testing.assert_allclose(linear[[499, 999]], [0.0785872, 4.03583e-5], rtol=2e-6)
    scaled = schedules.table(schedules.scaled_linear_betas())
    assert scaled.alphabars[999] == pytest.approx(0.00466010, rel=2e-6)
    ends = scaled.sigma(np.array([0.001, 1.0])) / scaled.alpha(np.array([0.001, 1.0]))
    np.testing.assert_allclose(ends, [0.0291672, 14.61464], rtol=2e-6)
    cosine = schedules.table(schedules.cosine_betas(1000)).alphabars
    expected = [0.9999587, 0.8470122, 0.4938436, 0.1442721, 2.42877e-9]
    np.testing.assert_allclose(cosine[[0, 249, 499, 749, 999]], expected, rtol=2e-6)


@pytest.mark.parametrize("name", TABLES)
def test_betas_may_be_a_list(name: str) -> None:
    betas = TABLES[name]
    np.testing.assert_array_equal(
        schedules.table(betas.tolist()).alphas, schedules.table(betas).alphas
    )
    scaled = schedules.zero_terminal_snr(betas.tolist())
    np.testing.assert_array_equal(scaled, schedules.zero_terminal_snr(betas))


@pytest.mark.parametrize("name", TABLES)
def test_nodes_are_the_table(name: str) -> None:
    betas = TABLES[name]
    schedule, steps = schedules.table(betas), len(betas)
    alphabars = np.cumprod(1 - betas)
    assert schedule.num_steps == steps
    np.testing.assert_allclose(schedule.alphabars, alphabars, rtol=1e-14)
    t = np.arange(1, steps + 1) / steps
    np.testing.assert_allclose(schedule.alpha(t) ** 2, alphabars, rtol=1e-13)
    np.testing.assert_allclose(schedule.sigma(t) ** 2, 1 - alphabars, rtol=1e-11)
    again = jax.jit(schedule.alpha)(jnp.asarray(t, jnp.float32)) ** 2
    np.testing.assert_allclose(again, alphabars, rtol=2e-6)


@pytest.mark.parametrize("name", TABLES)
def test_between_nodes_variance_is_preserved_and_the_angle_linear(name: str) -> None:
    schedule = schedules.table(TABLES[name])
    steps = schedule.num_steps
    cells = np.arange(0, steps, max(1, steps // 7))
    t = (cells[:, None] + np.array([0.0, 0.25, 0.5, 0.75, 1.0])) / steps
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1.0, rtol=1e-14)
    angle = np.arctan2(sigma, alpha)
    np.testing.assert_allclose(np.diff(angle, 2), 0.0, atol=1e-13)


def test_last_value_holds_past_one() -> None:
    schedule = schedules.table([0.1, 0.3])
    assert schedule.alpha(1.7) == schedule.alpha(1.0)
    assert schedule.t_from_logsnr(-30.0) == 1.0


def test_zero_terminal_snr_ends_without_signal_and_keeps_the_start() -> None:
    betas = schedules.zero_terminal_snr(schedules.linear_betas(200))
    assert betas[-1] == 1.0
    assert betas[0] == pytest.approx(1e-4)
    schedule = schedules.table(betas)
    assert schedule.alpha(1.0) == 0.0
    assert schedule.alphabars[-2] > 0.0


@pytest.mark.parametrize(
    ("betas", "words"),
    [
        ([], "not empty"),
        ([[0.1]], "one-dimensional"),
        ([0.1, 0.0], r"betas\[1\]=0.0"),
        ([0.1, 1.0, 0.2], r"betas\[1\]=1.0"),
        ([0.1, 1.2], r"betas\[1\]=1.2"),
        ([np.nan], r"betas\[0\]=nan"),
    ],
)
def test_bad_tables_are_named(betas: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        schedules.table(betas)


def test_number_of_steps_is_checked() -> None:
    with pytest.raises(ValueError, match="num_steps=0"):
        schedules.cosine_betas(0)
    with pytest.raises(ValueError, match="length 1"):
        schedules.zero_terminal_snr(np.array([0.1]))
