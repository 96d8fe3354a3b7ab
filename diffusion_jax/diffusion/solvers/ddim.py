"""DDIM (Song, Meng and Ermon 2021)."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array

from diffusion_jax.diffusion.broadcasting import Number
from diffusion_jax.diffusion.denoiser import as_denoiser
from diffusion_jax.diffusion.schedule_base import Schedule
from diffusion_jax.diffusion.solvers import stepping
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
) -> Result:
    """x_s = alpha_s x0 + sigma_s sqrt(1 - eta^2 (1 - e^-2h)) eps + eta sigma_s sqrt(1 - e^-2h) z.

    Song et al. 2021, equations 12 and 16, for any alpha and sigma. eta=0 is deterministic, eta=1 is
    DDPM with the small variance. Uses both x0 and eps of the denoiser, so that a clipped x0 goes
    with the eps predicted before clipping.

    Raises ValueError for eta outside [0, 1], bad times, or eta > 0 without key and noise.
    """
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta={eta}; expected a number from 0 (deterministic) to 1 (DDPM)")
    eta = float(eta)
    x = stepping.start(x)
    denoiser = as_denoiser(denoise, schedule)
    steps = stepping.steps_of(denoiser, schedule, times)
    xp = steps.xp
    # Written without the cancellation in 1 - eta^2 (1 - e^-2h). For eta=1 the root is e^-h itself,
    # and has a derivative also where that is 0.
    kept = steps.decay
    if eta < 1.0:
        kept = xp.sqrt((1.0 - eta) * (1.0 + eta) + (eta * steps.decay) ** 2)
    to_eps = steps.sigma_s * kept
    std = eta * steps.sigma_s * xp.sqrt(steps.fresh)
    draws = None
    if eta > 0.0:
        draws = stepping.draws("ddim with eta > 0", x, len(steps.t), key, noise, std > 0.0)

    def update(x: Array, carry: Any, row: Any) -> Any:
        (t, to_x0, to_eps, std), drawn = row
        denoised, carry = denoiser.step(x, t, carry)
        x_s = to_x0 * denoised.x0 + to_eps * denoised.eps
        if draws is not None:
            x_s = x_s + std * draws.draw(drawn, x.shape, x.dtype)
        return x_s, carry

    coefficients = stepping.cast(x, steps.t, steps.alpha_s, to_eps, std)
    rows = (coefficients, None if draws is None else draws.rows(len(steps.t)))
    return stepping.scan_steps(update, x, denoiser.init, rows, trajectory)
