"""DDPM ancestral sampling (Ho et al. 2020, algorithm 2), with a learned variance as an option."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from diffusion_jax.diffusion.denoiser import as_denoiser
from diffusion_jax.diffusion.schedule_base import Schedule
from diffusion_jax.diffusion.solvers import stepping
from diffusion_jax.diffusion.solvers.stepping import Denoise, Noise, Result, Start

VARIANCES = ("small", "large", "learned")


def ddpm(
    denoise: Denoise,
    schedule: Schedule,
    times: Any,
    x: Start,
    *,
    key: Array | None = None,
    noise: Noise | None = None,
    trajectory: bool = False,
    variance: str = "small",
) -> Result:
    """Draws x_s from the posterior q(x_s | x_t, x0) with the denoiser's x0 in place of x0.

    Ho et al. 2020, equations 6 and 7, over any `times`: mean e^-h (sigma_s/sigma_t) x_t +
    alpha_s (1 - e^-2h) x0. `variance` is "small", the posterior's sigma_s^2 (1 - e^-2h); "large",
    sigma_t^2 (1 - e^-2h), which is beta_t on adjacent steps of a beta table; or "learned", between
    their logarithms by the denoiser's `variance_fraction` (Nichol and Dhariwal 2021, equation 15).
    No noise is added on a step to sigma_s = 0. Uses x0, not eps, of the denoiser.

    Raises ValueError for an unknown variance, bad times, or without key and noise.
    """
    if variance not in VARIANCES:
        raise ValueError(f"variance={variance!r} is unknown; known: {', '.join(VARIANCES)}")
    x = stepping.start(x)
    denoiser = as_denoiser(denoise, schedule)
    steps = stepping.steps_of(denoiser, schedule, times)
    xp = steps.xp
    noisy = steps.sigma_s > 0.0
    level = steps.sigma_s if variance == "small" else steps.sigma_t
    std = xp.where(noisy, level * xp.sqrt(steps.fresh), 0.0)
    log_ratio = xp.log(xp.where(noisy, steps.sigma_ratio, 1.0))
    draws = stepping.draws("ddpm", x, len(steps.t), key, noise, noisy)

    def update(x: Array, carry: Any, row: Any) -> Any:
        (t, to_x, to_x0, std, log_ratio), drawn = row
        denoised, carry = denoiser.step(x, t, carry)
        if variance == "learned":
            if denoised.variance_fraction is None:
                raise ValueError("variance='learned'; this denoiser gives no variance_fraction")
            std = std * jnp.exp((1.0 - denoised.variance_fraction) * log_ratio)
        z = draws.draw(drawn, x.shape, x.dtype)
        return to_x * x + to_x0 * denoised.x0 + std * z, carry

    coefficients = stepping.cast(
        x, steps.t, steps.decay * steps.sigma_ratio, steps.alpha_s * steps.fresh, std, log_ratio
    )
    rows = (coefficients, draws.rows(len(steps.t)))
    return stepping.scan_steps(update, x, denoiser.init, rows, trajectory)
