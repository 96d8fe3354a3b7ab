"""Solvers with a schedule or with times that JAX traces."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import gaussian_denoiser
from quick import jit

from diffusion_jax.diffusion import schedules, solvers
from diffusion_jax.diffusion.processes import Gaussian

TIMES = np.array([1.0, 0.83, 0.55, 0.3, 0.12, 0.0])
X = np.random.default_rng(0).normal(size=(3, 4))
DRAWS = np.random.default_rng(1).normal(size=(5, 3, 4))
# Options that compute something of their own from the schedule or the times.
OPTIONS = [
    ("ddim", {"eta": 0.5}),
    ("ddim", {"stride": 100}),
    ("ddpm", {"variance": "large"}),
    ("dpmpp_3m", {"corrected": True}),
    ("dpmpp_sde", {"order": 3}),
    ("dpmpp_sde_singlestep", {"order": 3}),
    ("euler", {"s_churn": 1.0}),
    ("euler", {"s_churn": 1.0, "held": "v"}),
    ("euler_ancestral", {"eta": 0.3}),
    ("flow_heun", {"eta": 0.5}),
    ("heun", {"s_churn": 1.0}),
    ("kdpm2", {"s_churn": 1.0}),
    ("lms", {"corrected": True}),
    ("pndm", {"prk": False}),
    ("pndm", {"prk": False, "stride": 100}),
    ("pndm", {"stride": 100}),
    ("pndm", {"values": "v"}),
    ("tcd", {"table": True}),
    ("unipc", {"order": 3}),
    ("unipc", {"corrector": False, "corrected": True}),
]
CASES = [*((name, {}) for name in solvers.SOLVERS), *OPTIONS]


def run(case, shift=1.7, times=TIMES):
    name, options = case
    schedule = schedules.rectified_flow(shift)
    target = Gaussian(schedule) if name == "ancestral" else schedule
    noise = lambda step, draw, shape: DRAWS[step]  # noqa: E731
    denoise = gaussian_denoiser(schedule)
    return solvers.get(name)(denoise, target, times, X, noise=noise, **options)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_schedule_and_times_may_be_traced(case):
    for shape in (
        jax.eval_shape(lambda shift: run(case, shift), 1.7),
        jax.eval_shape(lambda times: run(case, times=times), jnp.asarray(TIMES)),
    ):
        assert (shape.shape, shape.dtype) == ((3, 4), jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case[0] != "dopri5"], ids=str)
def test_from_noise_to_data_traced_values_and_gradients_are_right(case):
    # From alpha = 0 to sigma = 0, where a branch that is not taken may have no derivative.
    with jax.enable_x64(True):
        expected = np.asarray(run(case))
        end = jit(jax.value_and_grad(lambda shift: run(case, shift).sum()))
        (value, gradient), step = end(jnp.float64(1.7)), 1e-5
        np.testing.assert_allclose(value, expected.sum(), rtol=1e-9)
        difference = (end(1.7 + step)[0] - end(1.7 - step)[0]) / (2.0 * step)
        np.testing.assert_allclose(gradient, difference, rtol=1e-5, atol=1e-8)
        actual = jit(lambda times: run(case, times=times))(jnp.asarray(TIMES))
        np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-12)
