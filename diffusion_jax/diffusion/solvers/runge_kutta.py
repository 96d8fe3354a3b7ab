"""Single-step methods of one or more inner levels: midpoint, RK4, KDPM2 and its ancestral form.

All integrate dy/du = (x - c x0)/sigma in the coordinates of `coordinates.py`; "sigma" unless
times[0] has alpha < 1e-3 sigma, or `coordinates` says otherwise. A step to sigma_s = 0 is an Euler
step, of one evaluation, so that the result is the denoiser's own x0. Slopes are those of x0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array

from diffusion_jax.diffusion.broadcasting import Number
from diffusion_jax.diffusion.denoiser import Denoiser
from diffusion_jax.diffusion.schedule_base import Schedule
from diffusion_jax.diffusion.solvers import stepping
from diffusion_jax.diffusion.solvers.coordinates import Coordinates, coordinates_of, levels_of
from diffusion_jax.diffusion.solvers.euler import euler_coefficients
from diffusion_jax.diffusion.solvers.noising import Noising, churned, lowered, quiet
from diffusion_jax.diffusion.solvers.stages import Method, advance, classical, stages_of
from diffusion_jax.diffusion.solvers.stepping import Denoise, Draws, Noise, Result, Start


def midpoint(
    denoise: Denoise,
    schedule: Schedule,
    times: Any,
    x: Start,
    *,
    key: Array | None = None,
    noise: Noise | None = None,
    trajectory: bool = False,
    coordinates: str | None = None,
) -> Result:
    """The midpoint rule: the slope at (u_t + u_s)/2, reached by an Euler step, over the whole step.

    Second order; two evaluations a step; deterministic, key and noise unused.

    Raises ConfigError for bad times or coordinates.
    """
    del key, noise

    def method(levels: Coordinates, xp: Any) -> Method:
        half = 0.5 * (levels.u_s - levels.u_t)
        return Method((levels.u_t + half,), (half,), (xp.zeros_like(half), 2.0 * half))

    return _quiet(method, denoise, schedule, times, x, trajectory, coordinates)


def rk4(
    denoise: Denoise,
    schedule: Schedule,
    times: Any,
    x: Start,
    *,
    key: Array | None = None,
    noise: Noise | None = None,
    trajectory: bool = False,
    coordinates: str | None = None,
) -> Result:
    """The classical Runge-Kutta method: slopes at t, twice at the middle of u, and at s.

    Fourth order; four evaluations a step; deterministic, key and noise unused.

    Raises ConfigError for bad times or coordinates.
    """
    del key, noise

    return _quiet(classical, denoise, schedule, times, x, trajectory, coordinates)


def kdpm2(
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
    """The midpoint rule with the inner level at sqrt(u_t u_s): k-diffusion's `sample_dpm_2`.

    The level is that of DPM-Solver-2 (Lu et al. 2022), the step Karras et al.'s. Second order; two
    evaluations a step. Churn before each step as in `euler`; without it (the default) key and noise
    are unused.

    Raises ConfigError for bad times, coordinates, options out of range, churn beyond the schedule,
    or churn without key and noise.
    """
    x, denoiser, steps = stepping.prepare(denoise, schedule, times, x)
    churn = churned(schedule, steps, s_churn, s_tmin, s_tmax, s_noise)
    draws = churn.draws("kdpm2 with s_churn > 0", x, key, noise) if s_churn else None
    flow = coordinates_of(steps, coordinates).flow
    return _integrate(_logarithmic, denoiser, schedule, churn, flow, x, draws, trajectory)


def kdpm2_ancestral(
    denoise: Denoise,
    schedule: Schedule,
    times: Any,
    x: Start,
    *,
    key: Array | None = None,
    noise: Noise | None = None,
    trajectory: bool = False,
    eta: Number = 1.0,
    s_noise: Number = 1.0,
    coordinates: str | None = None,
) -> Result:
    """`kdpm2` to the lower level u_down, then noise back up: `sample_dpm_2_ancestral`.

    u_up = eta u_s sqrt(1 - (u_s/u_t)^2) and u_down^2 = u_s^2 - u_up^2, as in `euler_ancestral`; the
    inner level is sqrt(u_t u_down). `s_noise` is a factor of the noise. Two evaluations and one
    draw a step; a step to sigma_s = 0, or from alpha_t = 0 with eta=1, is an Euler step.

    Raises ConfigError for bad times, coordinates, eta outside [0, 1], a negative s_noise, or
    eta > 0 without key and noise.
    """
    x, denoiser, steps = stepping.prepare(denoise, schedule, times, x)
    lower = lowered(schedule, steps, eta, s_noise)
    draws = lower.draws("kdpm2_ancestral", x, key, noise) if eta else None
    flow = coordinates_of(steps, coordinates).flow
    return _integrate(_logarithmic, denoiser, schedule, lower, flow, x, draws, trajectory)


def _logarithmic(levels: Coordinates, xp: Any) -> Method:
    # The root at 0 has no derivative; a step to there has no inner level either.
    ends = levels.u_s <= 0.0
    root = xp.where(ends, 0.0, xp.sqrt(xp.where(ends, 1.0, levels.u_s)))
    middle, step = xp.sqrt(levels.u_t) * root, levels.u_s - levels.u_t
    return Method((middle,), (middle - levels.u_t,), (xp.zeros_like(step), step))


def _quiet(
    method: Callable[[Coordinates, Any], Method],
    denoise: Denoise,
    schedule: Schedule,
    times: Any,
    x: Start,
    trajectory: bool,
    coordinates: str | None,
) -> Any:
    x, denoiser, steps = stepping.prepare(denoise, schedule, times, x)
    flow = coordinates_of(steps, coordinates).flow
    return _integrate(method, denoiser, schedule, quiet(steps), flow, x, None, trajectory)


def _integrate(
    choose: Callable[[Coordinates, Any], Method],
    denoiser: Denoiser,
    schedule: Schedule,
    noising: Noising,
    flow: Any,
    x: Array,
    draws: Draws | None,
    trajectory: bool,
) -> Any:
    steps = noising.steps
    levels = levels_of(steps, flow)
    stages = stages_of(choose(levels, steps.xp), schedule, levels, steps.xp, x)

    def update(x: Array, carry: Any, row: Any) -> Any:
        (t, c_t, c_s, to_y, to_slope, to_x, to_x0), inner, whole = row
        first, carry = denoiser.step(x, t, carry)

        def all_stages(carry: Any) -> Any:
            y, slope = to_y * x, to_slope * (x - c_t * first.x0)
            y_s, carry = advance(denoiser, y, slope, carry, inner)
            return c_s * y_s, carry

        def euler_step(carry: Any) -> Any:
            return to_x * x + to_x0 * first.x0, carry

        return jax.lax.cond(whole, all_stages, euler_step, carry)

    ends = (steps.t, *levels.ends(steps), *euler_coefficients(steps))
    rows = (stepping.cast(x, *ends), stages, steps.sigma_s > 0.0)
    noisy, noise_rows = noising.around(update, x, draws)
    return stepping.scan_steps(noisy, x, denoiser.init, (rows, noise_rows), trajectory)
