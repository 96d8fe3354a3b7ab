"""Euler's method on the probability-flow ODE, with churn or ancestral noise."""

from __future__ import annotations

import math
from typing import Any

from jaxtyping import Array

from diffusion_jax.diffusion.broadcasting import Number
from diffusion_jax.diffusion.denoiser import Denoiser
from diffusion_jax.diffusion.schedule_base import Schedule
from diffusion_jax.diffusion.solvers import stepping
from diffusion_jax.diffusion.solvers.linear import scan_linear
from diffusion_jax.diffusion.solvers.noising import (
    Noising,
    ancestral_split,
    check_eta,
    check_noise,
    churned,
)
from diffusion_jax.diffusion.solvers.stepping import Denoise, Draws, Noise, Result, Start, Steps
from diffusion_jax.errors import ConfigError, unknown_name

HELD = ("eps", "x0", "v", "edm")


def euler(
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
    held: str | None = None,
    sigma_data: Number = 0.5,
) -> Result:
    """Euler's method for dy/du = (x - alpha x0)/sigma with y = x/alpha and u = sigma/alpha.

    x_s = (sigma_s/sigma_t) x_t + alpha_s (1 - e^-h) x0: the same in the coordinates x/(alpha+sigma)
    over sigma/(alpha+sigma), so that alpha_t = 0 needs no care. With an unaltered denoiser this is
    DDIM, DPM-Solver++ of order 1 and the flow-matching Euler step; a clipped x0 alters the slope
    here, since eps of the denoiser is not used. First order; one evaluation a step.

    Churn is that of Karras et al. 2022, algorithm 2: where s_tmin <= u <= s_tmax, noise of
    s_noise times the exact standard deviation raises u by gamma = min(s_churn/steps, sqrt(2) - 1)
    of it before the step. Without churn (the default) key and noise are unused.

    `held`, for parity with libraries that add the noise after the evaluation: the denoiser sees the
    state before the noise, and the prediction of this name ("eps", "x0", "v" at the old level, or
    EDM's F with `sigma_data`) is kept over it. None evaluates after the noise, as the paper does.

    Raises ConfigError for bad times, options out of range, an unknown `held`, churn beyond the
    schedule, or churn without key and noise.
    """
    if held is not None and held not in HELD:
        raise ConfigError(unknown_name("held", held, HELD))
    x, denoiser, steps = stepping.prepare(denoise, schedule, times, x)
    churn = churned(schedule if held is None else None, steps, s_churn, s_tmin, s_tmax, s_noise)
    draws = churn.draws("euler with s_churn > 0", x, key, noise) if s_churn else None
    if held is not None and draws is not None:
        return _held_steps(denoiser, steps, churn, held, float(sigma_data), x, draws, trajectory)

    def update(x: Array, carry: Any, row: Any) -> Any:
        t, to_x, to_x0 = row
        denoised, carry = denoiser.step(x, t, carry)
        return to_x * x + to_x0 * denoised.x0, carry

    coefficients = stepping.cast(x, churn.steps.t, *euler_coefficients(churn.steps))
    noisy, noise_rows = churn.around(update, x, draws)
    return stepping.scan_steps(noisy, x, denoiser.init, (coefficients, noise_rows), trajectory)


def euler_ancestral(
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
) -> Result:
    """An Euler step below s, to u_down, and noise back up to s (k-diffusion).

    With u = sigma/alpha: u_up = eta u_s sqrt(1 - (u_s/u_t)^2), u_down = sqrt(u_s^2 - u_up^2). This
    is DDIM with the same eta, but for the eps, which here is that of x0, altered or not, and for
    `s_noise`, a factor of the noise. One evaluation and one draw a step, none on a step to
    sigma_s = 0.

    Raises ConfigError for eta outside [0, 1], a negative s_noise, bad times, or eta > 0
    without key and noise.
    """
    check_eta(eta)
    check_noise(s_noise)
    x, denoiser, steps = stepping.prepare(denoise, schedule, times, x)
    kept, std = ancestral_split(steps, eta, s_noise)
    draws = None
    if eta > 0.0:
        draws = stepping.draws("euler_ancestral", x, len(steps.t), key, noise, std > 0.0)

    to_x0 = steps.alpha_s * (1.0 - kept * steps.decay)
    columns = (steps.t, kept * steps.sigma_ratio, to_x0, std)
    return scan_linear(denoiser, x, columns, draws, trajectory)


def euler_coefficients(steps: Steps) -> tuple[Any, Any]:
    """What multiplies x_t and x0 in an Euler step, each [steps]."""
    return steps.sigma_ratio, steps.alpha_s * (1.0 - steps.decay)


def _held_steps(
    denoiser: Denoiser,
    steps: Steps,
    churn: Noising,
    held: str,
    sigma_data: float,
    x: Array,
    draws: Draws,
    trajectory: bool,
) -> Any:
    """Euler steps whose predictions are made before the noise is added."""

    def update(x: Array, carry: Any, row: Any) -> Any:
        (t, to_x, to_x0, scale, std, kept, old, new), drawn = row
        denoised, carry = denoiser.step(x, t, carry)
        noisy = scale * x + std * draws.draw(drawn, x.shape, x.dtype)
        return to_x * noisy + to_x0 * (kept * (denoised.x0 - old * x) + new * noisy), carry

    coefficients = stepping.cast(
        x,
        steps.t,
        *euler_coefficients(churn.steps),
        churn.scale,
        churn.std,
        *_held_coefficients(steps, churn, held, sigma_data),
    )
    rows = (coefficients, draws.rows(len(steps.t)))
    return stepping.scan_steps(update, x, denoiser.init, rows, trajectory)


def _held_coefficients(
    steps: Steps, churn: Noising, held: str, sigma_data: float
) -> tuple[Any, Any, Any]:
    """a, b, c of x0 = a (x0_before - b x_before) + c x_after, for a prediction kept over noise.

    Predictions are (x0 - skip(u) x/alpha)/out(u); a = out(u_hat)/out(u) and b, c are skip/alpha
    before and after. Libraries keep the old level in the skip of v, and its out.
    """
    xp = steps.xp
    churns = churn.std > 0.0
    one, zero = xp.ones_like(steps.sigma_t), xp.zeros_like(steps.sigma_t)
    if held == "x0":
        return one, zero, zero
    alpha = xp.where(churns, steps.alpha_t, 1.0)
    u, u_hat = steps.sigma_t / alpha, churn.steps.sigma_t / alpha
    if held == "eps":
        kept, old, new = u_hat / u, one, one
    elif held == "v":
        kept, old = one, 1.0 / (u**2 + 1.0)
        new = old
    else:
        variance, variance_hat = u**2 + sigma_data**2, u_hat**2 + sigma_data**2
        kept = u_hat / u * xp.sqrt(variance / variance_hat)
        old, new = sigma_data**2 / variance, sigma_data**2 / variance_hat
    return (
        xp.where(churns, kept, 1.0),
        xp.where(churns, old / alpha, 0.0),
        xp.where(churns, new / alpha, 0.0),
    )
