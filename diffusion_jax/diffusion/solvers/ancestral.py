"""Ancestral sampling of any noising process."""

from __future__ import annotations

from typing import Any

from jax.core import Tracer
from jaxtyping import Array

from diffusion_jax.diffusion.denoiser import as_denoiser
from diffusion_jax.diffusion.processes.protocol import Process
from diffusion_jax.diffusion.solvers import stepping
from diffusion_jax.diffusion.solvers.stepping import (
    Denoise,
    Noise,
    Result,
    Start,
    TokenResult,
    TokenStart,
)
from diffusion_jax.diffusion.time_grids import check_times


def ancestral(
    denoise: Denoise,
    process: Process,
    times: Any,
    x: Start | TokenStart,
    *,
    key: Array | None = None,
    noise: Noise | None = None,
    trajectory: bool = False,
) -> Result | TokenResult:
    """Draws x_s from process.posterior(x_t, x0_hat, t, s), x0_hat being the denoiser's x0.

    The second argument is a Process instead of a schedule. `noise` replays draws of
    `process.noise` (uniform ones for bits and tokens). For the Gaussian process this is `ddpm`,
    whose coefficients are computed in float64 while here the process computes them in the type of
    x. Tokens are whole numbers from beginning to end.

    Raises ConfigError for bad times, or without key and noise.
    """
    state = stepping.start_of(process, x)
    denoiser = as_denoiser(denoise)
    if not isinstance(times, Tracer):
        times = check_times(times)
        denoiser.check_start(times[0])
    draws = stepping.draws("ancestral", state, len(times) - 1, key, noise)

    def update(x: Array, carry: Any, row: Any) -> Any:
        (t, s), drawn = row
        denoised, carry = denoiser.step(x, t, carry)
        step = process.posterior(x, denoised.x0, t, s)
        noise = draws.draw(drawn, x.shape, stepping.compute_dtype(x), process.noise)
        return step.transform(noise), carry

    rows = (stepping.cast(state, times[:-1], times[1:]), draws.rows(len(times) - 1))
    return stepping.scan_steps(update, state, denoiser.init, rows, trajectory)
