"""Euler's and Heun's methods on the probability-flow ODE (Karras et al. 2022, algorithm 1)."""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import Array

from diffusion_jax.diffusion.denoiser import as_denoiser
from diffusion_jax.diffusion.schedule_base import Schedule
from diffusion_jax.diffusion.solvers import stepping
from diffusion_jax.diffusion.solvers.stepping import Denoise, Noise, Result, Start, Steps

# From a smaller alpha/sigma the first step would span nearly all of sigma/alpha, and the mean of
# the slopes at its ends be that of none between. EDM starts at 1/80, Stable Diffusion at 1/14.6.
LEAST_SNR_AMPLITUDE = 1e-3


def euler(
    denoise: Denoise,
    schedule: Schedule,
    times: Any,
    x: Start,
    *,
    key: Array | None = None,
    noise: Noise | None = None,
    trajectory: bool = False,
) -> Result:
    """Euler's method for dy/du = (x - alpha x0)/sigma with y = x/alpha and u = sigma/alpha.

    x_s = (sigma_s/sigma_t) x_t + alpha_s (1 - e^-h) x0: the same in the coordinates x/(alpha+sigma)
    over sigma/(alpha+sigma), so that alpha_t = 0 needs no care. With an unaltered denoiser this is
    DDIM, DPM-Solver++ of order 1 and the flow-matching Euler step; a clipped x0 alters the slope
    here, since eps of the denoiser is not used. First order; deterministic, key and noise unused.

    Raises ValueError for bad times.
    """
    del key, noise
    x = stepping.start(x)
    denoiser = as_denoiser(denoise, schedule)
    steps = stepping.steps_of(denoiser, schedule, times)

    def update(x: Array, carry: Any, row: Any) -> Any:
        t, to_x, to_x0 = row
        denoised, carry = denoiser.step(x, t, carry)
        return to_x * x + to_x0 * denoised.x0, carry

    rows = stepping.cast(x, steps.t, *_euler_coefficients(steps))
    return stepping.scan_steps(update, x, denoiser.init, rows, trajectory)


def heun(
    denoise: Denoise,
    schedule: Schedule,
    times: Any,
    x: Start,
    *,
    key: Array | None = None,
    noise: Noise | None = None,
    trajectory: bool = False,
) -> Result:
    """Heun's method: an Euler step to s, then the mean of the slopes at both ends.

    Integrates y = x/alpha over u = sigma/alpha. Where times[0] has alpha = 0, or below 1e-3 sigma,
    all steps integrate y = x/(alpha+sigma) over u = sigma/(alpha+sigma) instead: for a rectified
    flow, x over sigma with the velocity as slope. A step to sigma_s = 0 stays an Euler step. Slopes
    are those of x0 of the denoiser. Second order; two evaluations a step; deterministic, key and
    noise unused.

    Raises ValueError for bad times.
    """
    del key, noise
    x = stepping.start(x)
    denoiser = as_denoiser(denoise, schedule)
    steps = stepping.steps_of(denoiser, schedule, times)

    def update(x: Array, carry: Any, row: Any) -> Any:
        (t, s, to_x, to_x0, to_change), corrected = row
        first, carry = denoiser.step(x, t, carry)
        predicted = to_x * x + to_x0 * first.x0

        def correct(carry: Any) -> Any:
            second, carry = denoiser.step(predicted, s, carry)
            return predicted + to_change * (second.x0 - first.x0), carry

        return jax.lax.cond(corrected, correct, lambda carry: (predicted, carry), carry)

    corrected = steps.sigma_s > 0.0
    rows = stepping.cast(x, steps.t, steps.s, *_euler_coefficients(steps), _heun_coefficient(steps))
    return stepping.scan_steps(update, x, denoiser.init, (rows, corrected), trajectory)


def _euler_coefficients(steps: Steps) -> tuple[Any, Any]:
    return steps.sigma_ratio, steps.alpha_s * (1.0 - steps.decay)


def _heun_coefficient(steps: Steps) -> Any:
    """What multiplies x0(x_s, s) - x0(x_t, t), the change of the prediction over the step.

    In coordinates x/c over sigma/c, with c either alpha or alpha + sigma, x0 enters the slope with
    the factor -c/sigma. Both slopes share the Euler step, so that half their difference times the
    step in sigma/c, in units of x, is c_s (c_s sigma_t / (c_t sigma_s) - 1)/2 of that change.
    """
    xp = steps.xp
    flow = steps.alpha_t[0] < LEAST_SNR_AMPLITUDE * steps.sigma_t[0]
    c_t = steps.alpha_t + xp.where(flow, steps.sigma_t, 0.0)
    c_s = steps.alpha_s + xp.where(flow, steps.sigma_s, 0.0)
    ended = steps.sigma_s <= 0.0
    sigma_s = xp.where(ended, 1.0, steps.sigma_s)
    growth = c_s * steps.sigma_t / (c_t * sigma_s) - 1.0
    return xp.where(ended, 0.0, 0.5 * c_s * growth)
