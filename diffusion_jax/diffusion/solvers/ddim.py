"""DDIM (Song, Meng and Ermon 2021)."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array

from diffusion_jax.diffusion.broadcasting import Count, Number
from diffusion_jax.diffusion.denoiser import as_denoiser
from diffusion_jax.diffusion.schedule_base import Schedule
from diffusion_jax.diffusion.solvers import stepping
from diffusion_jax.diffusion.solvers.noising import ancestral_split, check_eta
from diffusion_jax.diffusion.solvers.stepping import Denoise, Noise, Result, Start


def ddim(
    denoise: Denoise,
    schedule: Schedule,
    times: Any,
    x: Start,
    *,
    key: Array | None = None,
    noise: Noise | None = None,
    trajectory: bool = False,
    eta: Number = 0.0,
    eps_from_x0: bool = False,
    stride: Count | None = None,
) -> Result:
    """x_s = alpha_s x0 + sigma_s sqrt(1 - eta^2 (1 - e^-2h)) eps + eta sigma_s sqrt(1 - e^-2h) z.

    Song et al. 2021, equations 12 and 16, for any alpha and sigma. eta=0 is deterministic, eta=1 is
    DDPM with the small variance. Uses both x0 and eps of the denoiser, so that a clipped x0 goes
    with the eps predicted before clipping.

    `eps_from_x0` takes the eps that goes with the altered x0 instead, (x - alpha_t x0)/sigma_t.
    `stride`, entries of the schedule's table: each step ends this many below its start, whatever
    the next time is, as libraries do for any spacing. None takes the times as they are.

    First order; one evaluation a step. Raises ConfigError for eta outside [0, 1], bad times, a
    stride that is not whole and above 0, or eta > 0 without key and noise.
    """
    check_eta(eta)
    x = stepping.start(x)
    denoiser = as_denoiser(denoise, schedule)
    steps = stepping.strided(schedule, stepping.steps_of(denoiser, schedule, times), stride)
    kept, std = ancestral_split(steps, eta, 1.0)
    draws = None
    if eta > 0.0:
        draws = stepping.draws("ddim with eta > 0", x, len(steps.t), key, noise, std > 0.0)

    def update(x: Array, carry: Any, row: Any) -> Any:
        (t, to_x0, to_eps, std, alpha, sigma), drawn = row
        denoised, carry = denoiser.step(x, t, carry)
        eps = (x - alpha * denoised.x0) / sigma if eps_from_x0 else denoised.eps
        x_s = to_x0 * denoised.x0 + to_eps * eps
        if draws is not None:
            x_s = x_s + std * draws.draw(drawn, x.shape, x.dtype)
        return x_s, carry

    to_eps = steps.sigma_s * kept
    levels = (steps.alpha_t, steps.sigma_t)
    coefficients = stepping.cast(x, steps.t, steps.alpha_s, to_eps, std, *levels)
    rows = (coefficients, None if draws is None else draws.rows(len(steps.t)))
    return stepping.scan_steps(update, x, denoiser.init, rows, trajectory)
