"""Few-step sampling of distilled networks: latent consistency and trajectory consistency models."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Array

from diffusion_jax.diffusion.broadcasting import Number
from diffusion_jax.diffusion.schedule_base import Schedule
from diffusion_jax.diffusion.solvers import stepping
from diffusion_jax.diffusion.solvers.linear import scan_linear
from diffusion_jax.diffusion.solvers.stepping import Denoise, Noise, Result, Start, Steps
from diffusion_jax.errors import ConfigError


def lcm(
    denoise: Denoise,
    schedule: Schedule,
    times: Any,
    x: Start,
    *,
    key: Array | None = None,
    noise: Noise | None = None,
    trajectory: bool = False,
    timestep_scaling: Number | None = 10.0,
    sigma_data: Number = 0.5,
) -> Result:
    """Multistep consistency sampling: x_s = alpha_s f(x_t, t) + sigma_s z, f the data's estimate.

    Song et al. 2023, "Consistency Models", algorithm 1; Luo et al. 2023, "Latent Consistency
    Models", algorithm 3. f = c_skip x_t + c_out x0 with the boundary condition of latent
    consistency models, of tau = timestep_scaling (T t - 1), T the entries of the schedule's table:
    c_skip = sigma_data^2/(tau^2 + sigma_data^2), c_out = tau/sqrt(tau^2 + sigma_data^2). With
    timestep_scaling=None f is x0. Exact for the conditional mean only of a point mass: it is meant
    for a network that maps to the end of the path. One evaluation and one draw a step; none on a
    step to sigma_s = 0. Uses x0, not eps, of the denoiser.

    Raises ConfigError for a timestep_scaling or sigma_data that is not positive, bad times,
    or without key and noise.
    """
    for name, value in (("timestep_scaling", timestep_scaling), ("sigma_data", sigma_data)):
        if value is not None and not value > 0.0:
            raise ConfigError(f"{name}={value}; expected a positive number")
    x, denoiser, steps = stepping.prepare(denoise, schedule, times, x)
    skip, out = steps.xp.zeros_like(steps.alpha_s), steps.xp.ones_like(steps.alpha_s)
    if timestep_scaling is not None:
        tau = float(timestep_scaling) * (schedule.num_steps * steps.t - 1.0)
        variance = tau**2 + float(sigma_data) ** 2
        skip, out = float(sigma_data) ** 2 / variance, tau / variance**0.5
    draws = stepping.draws("lcm", x, len(steps.t), key, noise, steps.sigma_s > 0.0)

    columns = (steps.t, steps.alpha_s * skip, steps.alpha_s * out, steps.sigma_s)
    return scan_linear(denoiser, x, columns, draws, trajectory)


def tcd(
    denoise: Denoise,
    schedule: Schedule,
    times: Any,
    x: Start,
    *,
    key: Array | None = None,
    noise: Noise | None = None,
    trajectory: bool = False,
    gamma: Number = 0.3,
    table: bool = False,
) -> Result:
    """Strategic stochastic sampling (Zheng et al. 2024, "Trajectory Consistency Distillation").

    Algorithm 4: x_r = alpha_r x0 + sigma_r eps at r = (1 - gamma) s, then forward noise to s: x_s =
    (alpha_s/alpha_r) x_r + sqrt(sigma_s^2 - sigma_r^2 alpha_s^2/alpha_r^2) z. gamma (`eta` in
    libraries) 0 is DDIM, 1 is consistency sampling with x0. No noise is added on the last step,
    which ends at r, not at times[-1], unless that is 0: give a grid that ends there, or gamma=0.

    `table`, for parity: r is an entry of the schedule's table of T, T r - 1 = floor((1 - gamma)
    (T s - 1)) in float32, and the last step ends there.

    One evaluation and one draw a step. Uses x0 and eps of the denoiser, as `ddim` does.

    Raises ConfigError for gamma outside [0, 1], bad times, or gamma > 0 without key and
    noise.
    """
    if not 0.0 <= gamma <= 1.0:
        raise ConfigError(f"gamma={gamma}; expected a number from 0 (deterministic) to 1")
    x, denoiser, steps = stepping.prepare(denoise, schedule, times, x)
    lower, std = _lower_ends(schedule, steps, float(gamma), table)
    draws = None
    if gamma > 0.0:
        draws = stepping.draws("tcd with gamma > 0", x, len(steps.t), key, noise, std > 0.0)

    return scan_linear(denoiser, x, (steps.t, *lower, std), draws, trajectory, of_eps=True)


def _lower_ends(schedule: Schedule, steps: Steps, gamma: float, table: bool) -> tuple[Any, Any]:
    """What multiplies (eps, x0), and the noise that is added, each [steps]."""
    xp = steps.xp
    r = (1.0 - gamma) * steps.s
    if table:
        size = schedule.num_steps
        entry = xp.round(xp.asarray(steps.s) * size - 1.0).astype(np.float32)
        kept = xp.floor(np.float32(1.0 - gamma) * entry).astype(xp.result_type(float))
        r = (kept + 1.0) / size
    alpha, sigma = schedule.alpha(r), schedule.sigma(r)
    ratio = steps.alpha_s / alpha
    fresh = steps.sigma_s**2 - (sigma * ratio) ** 2
    renewed = xp.arange(len(steps.t)) < len(steps.t) - 1
    renewed = renewed & (fresh > 0.0) & (gamma > 0.0)
    std = xp.where(renewed, xp.sqrt(xp.where(renewed, fresh, 1.0)), 0.0)
    scale = xp.where(renewed, ratio, 1.0)
    return (scale * sigma, scale * alpha), std
