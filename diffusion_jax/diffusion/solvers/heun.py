"""Heun's method on the probability-flow ODE (Karras et al. 2022, algorithms 1 and 2)."""

from __future__ import annotations

import math
from typing import Any

import jax
from jaxtyping import Array

from diffusion_jax.diffusion.broadcasting import Number
from diffusion_jax.diffusion.denoiser import Denoiser
from diffusion_jax.diffusion.schedule_base import Schedule
from diffusion_jax.diffusion.solvers import stepping
from diffusion_jax.diffusion.solvers.coordinates import coordinates_of
from diffusion_jax.diffusion.solvers.euler import euler_coefficients
from diffusion_jax.diffusion.solvers.noising import Noising, churned
from diffusion_jax.diffusion.solvers.stepping import Denoise, Draws, Noise, Result, Start, Steps


def heun(
    denoise: Denoise,
    schedule: Schedule,
    times: Any,
    x: Start,
    *,
    key: Array | None = None,
    noise: Noise | None = None,
    trajectory: bool = False,
    s_churn: Number = 0.0,
    s_tmin: Number = 0.0,
    s_tmax: Number = math.inf,
    s_noise: Number = 1.0,
    coordinates: str | None = None,
) -> Result:
    """Heun's method: an Euler step to s, then the mean of the slopes at both ends.

    Integrates y = x/alpha over u = sigma/alpha. Where times[0] has alpha = 0, or below 1e-3 sigma,
    all steps integrate y = x/(alpha+sigma) over u = sigma/(alpha+sigma) instead: for a rectified
    flow, x over sigma with the velocity as slope. `coordinates`, "sigma" or "flow", chooses. A step
    to sigma_s = 0 stays an Euler step. Slopes are those of x0 of the denoiser. Second order; two
    evaluations a step.

    Churn before each step as in `euler`, whose s_churn, s_tmin, s_tmax and s_noise these are.
    Without it (the default) key and noise are unused.

    Raises ConfigError for bad times, options out of range, coordinates that divide by alpha = 0,
    churn beyond the schedule, or churn without key and noise.
    """
    x, denoiser, steps = stepping.prepare(denoise, schedule, times, x)
    churn = churned(schedule, steps, s_churn, s_tmin, s_tmax, s_noise)
    draws = churn.draws("heun with s_churn > 0", x, key, noise) if s_churn else None
    flow = coordinates_of(steps, coordinates).flow
    return heun_steps(denoiser, churn, flow, x, draws, trajectory)


def heun_steps(
    denoiser: Denoiser,
    noising: Noising,
    flow: Any,
    x: Array,
    draws: Draws | None,
    trajectory: bool,
) -> Any:
    """Heun's method between the levels of `noising`, with c = alpha + sigma where `flow`."""

    def update(x: Array, carry: Any, row: Any) -> Any:
        (t, s, to_x, to_x0, to_change), corrected = row
        first, carry = denoiser.step(x, t, carry)
        predicted = to_x * x + to_x0 * first.x0

        def correct(carry: Any) -> Any:
            second, carry = denoiser.step(predicted, s, carry)
            return predicted + to_change * (second.x0 - first.x0), carry

        return jax.lax.cond(corrected, correct, lambda carry: (predicted, carry), carry)

    steps = noising.steps
    coefficients = (*euler_coefficients(steps), _heun_coefficient(steps, flow))
    levels = stepping.cast(x, steps.t, steps.s, *coefficients)
    update_with_noise, noise_rows = noising.around(update, x, draws)
    rows = ((levels, steps.sigma_s > 0.0), noise_rows)
    return stepping.scan_steps(update_with_noise, x, denoiser.init, rows, trajectory)


def _heun_coefficient(steps: Steps, flow: Any) -> Any:
    """What multiplies x0(x_s, s) - x0(x_t, t), the change of the prediction over the step.

    In coordinates x/c over sigma/c, with c either alpha or alpha + sigma, x0 enters the slope with
    the factor -c/sigma. Both slopes share the Euler step, so that half their difference times the
    step in sigma/c, in units of x, is c_s (c_s sigma_t / (c_t sigma_s) - 1)/2 of that change.
    """
    xp = steps.xp
    c_t = steps.alpha_t + xp.where(flow, steps.sigma_t, 0.0)
    c_s = steps.alpha_s + xp.where(flow, steps.sigma_s, 0.0)
    ended = steps.sigma_s <= 0.0
    sigma_s = xp.where(ended, 1.0, steps.sigma_s)
    growth = c_s * steps.sigma_t / (c_t * sigma_s) - 1.0
    return xp.where(ended, 0.0, 0.5 * c_s * growth)
