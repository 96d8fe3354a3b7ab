"""Ancestral sampling of any noising process."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array

from diffusion_jax.diffusion.denoiser import as_denoiser
from diffusion_jax.diffusion.processes.protocol import Process
from diffusion_jax.diffusion.solvers import stepping
from diffusion_jax.diffusion.solvers.stepping import Denoise, Noise, Result, Start
from diffusion_jax.diffusion.time_grids import check_times


def ancestral(
    denoise: Denoise,
    process: Process,
    times: Any,
    x: Start,
    *,
    key: Array | None = None,
    noise: Noise | None = None,
    trajectory: bool = False,
) -> Result:
    """Draws x_s from process.posterior(x_t, x0_hat, t, s), x0_hat being the denoiser's x0.

    The second argument is a Process instead of a schedule. `noise` replays draws of
    `process.noise` (uniform ones for bits). For the Gaussian process this is `ddpm`, whose
    coefficients are computed in float64 while here the process computes them in the type of x.

    Raises ValueError for bad times, or without key and noise.
    """
    x = stepping.start(x)
    denoiser, times = as_denoiser(denoise), check_times(times)
    denoiser.check_start(times[0])
    draws = stepping.draws("ancestral", x, len(times) - 1, key, noise)

    def update(x: Array, carry: Any, row: Any) -> Any:
        (t, s), drawn = row
        denoised, carry = denoiser.step(x, t, carry)
        step = process.posterior(x, denoised.x0, t, s)
        return step.transform(draws.draw(drawn, x.shape, x.dtype, process.noise)), carry

    rows = (stepping.cast(x, times[:-1], times[1:]), draws.rows(len(times) - 1))
    return stepping.scan_steps(update, x, denoiser.init, rows, trajectory)
