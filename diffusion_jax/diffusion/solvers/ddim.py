"""DDIM (Song, Meng and Ermon 2021)."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array

from diffusion_jax.diffusion.broadcasting import Count, Number
from diffusion_jax.diffusion.schedule_base import Schedule
from diffusion_jax.diffusion.solvers import stepping
from diffusion_jax.diffusion.solvers.linear import scan_linear
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
    x, denoiser, steps = stepping.prepare(denoise, schedule, times, x)
    steps = stepping.strided(schedule, steps, stride)
    kept, std = ancestral_split(steps, eta, 1.0)
    draws = None
    if eta > 0.0:
        draws = stepping.draws("ddim with eta > 0", x, len(steps.t), key, noise, std > 0.0)

    if eps_from_x0:
        coefficients = kept * steps.sigma_ratio, steps.alpha_s * (1.0 - kept * steps.decay)
    else:
        coefficients = kept * steps.sigma_s, steps.alpha_s
    columns = (steps.t, *coefficients, std)
    return scan_linear(denoiser, x, columns, draws, trajectory, of_eps=not eps_from_x0)
