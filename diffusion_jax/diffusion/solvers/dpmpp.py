"""DPM-Solver++ as a multistep method: the ODE solver of order 2 and the SDE solver of order 1 or 2.

Both extrapolate the denoiser's x0 from this and the previous step,

    D = x0 + h/(2 h_previous) (x0 - x0_previous),

h being the rise of log(alpha/sigma). Start-up rule: the first step, steps whose own h is infinite
(from alpha_t = 0, or to sigma_s = 0) and the step after an infinite h use D = x0 (order 1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from diffusion_jax.diffusion.denoiser import Denoiser, as_denoiser
from diffusion_jax.diffusion.schedule_base import Schedule
from diffusion_jax.diffusion.solvers import stepping
from diffusion_jax.diffusion.solvers.stepping import Denoise, Noise, Result, Start, Steps


def dpmpp_2m(
    denoise: Denoise,
    schedule: Schedule,
    times: Any,
    x: Start,
    *,
    key: Array | None = None,
    noise: Noise | None = None,
    trajectory: bool = False,
) -> Result:
    """DPM-Solver++(2M): x_s = (sigma_s/sigma_t) x_t + alpha_s (1 - e^-h) D.

    Lu et al. 2022, "DPM-Solver++", algorithm 2. Second order; one evaluation a step; deterministic,
    key and noise unused. Uses x0, not eps, of the denoiser.

    Raises ValueError for bad times.
    """
    del key, noise
    x = stepping.start(x)
    denoiser = as_denoiser(denoise, schedule)
    steps = stepping.steps_of(denoiser, schedule, times)

    def update(x: Array, history: Any, row: Any) -> Any:
        t, to_x, to_x0, extrapolation = row
        carry, previous = history
        denoised, carry = denoiser.step(x, t, carry)
        target = denoised.x0 + extrapolation * (denoised.x0 - previous)
        return to_x * x + to_x0 * target, (carry, denoised.x0)

    to_x0 = steps.alpha_s * (1.0 - steps.decay)
    rows = stepping.cast(x, steps.t, steps.sigma_ratio, to_x0, _extrapolation(steps))
    return stepping.scan_steps(update, x, _no_history(denoiser), rows, trajectory)


def dpmpp_sde(
    denoise: Denoise,
    schedule: Schedule,
    times: Any,
    x: Start,
    *,
    key: Array | None = None,
    noise: Noise | None = None,
    trajectory: bool = False,
    order: int = 2,
) -> Result:
    """SDE-DPM-Solver++, multistep of order 1 or 2 (Lu et al. 2022, "DPM-Solver++", section 4.3):

    x_s = e^-h (sigma_s/sigma_t) x_t + alpha_s (1 - e^-2h) D + sigma_s sqrt(1 - e^-2h) z.

    Order 1 (D = x0) is DDPM with the small variance. Not the single-step method with a midpoint
    that some libraries call by this name. One evaluation and one draw a step; uses x0, not eps.

    Raises ValueError for another order, bad times, or without key and noise.
    """
    if order not in (1, 2):
        raise ValueError(f"order={order}; expected 1 or 2")
    x = stepping.start(x)
    denoiser = as_denoiser(denoise, schedule)
    steps = stepping.steps_of(denoiser, schedule, times)
    std = steps.sigma_s * steps.xp.sqrt(steps.fresh)
    extrapolation = _extrapolation(steps) * (order - 1)
    draws = stepping.draws("dpmpp_sde", x, len(steps.t), key, noise, std > 0.0)

    def update(x: Array, history: Any, row: Any) -> Any:
        (t, to_x, to_x0, std, extrapolation), drawn = row
        carry, previous = history
        denoised, carry = denoiser.step(x, t, carry)
        target = denoised.x0 + extrapolation * (denoised.x0 - previous)
        z = draws.draw(drawn, x.shape, x.dtype)
        return to_x * x + to_x0 * target + std * z, (carry, denoised.x0)

    coefficients = stepping.cast(
        x,
        steps.t,
        steps.sigma_ratio * steps.decay,
        steps.alpha_s * steps.fresh,
        std,
        extrapolation,
    )
    rows = (coefficients, draws.rows(len(steps.t)))
    return stepping.scan_steps(update, x, _no_history(denoiser), rows, trajectory)


def _no_history(denoiser: Denoiser) -> Callable[[Array], Any]:
    """x -> the denoiser's carry, and a previous x0 that the first step multiplies by 0."""
    return lambda x: (denoiser.init(x), jnp.zeros_like(x))


def _extrapolation(steps: Steps) -> Any:
    """h/(2 h_previous), 0 where there is no history to use."""
    xp = steps.xp
    rise = steps.rise
    previous = xp.concatenate([xp.full(1, xp.inf), rise[:-1]])
    usable = xp.isfinite(rise) & xp.isfinite(previous)
    return xp.where(usable, 0.5 * xp.where(usable, rise, 0.0) / previous, 0.0)
