"""DDPM ancestral sampling (Ho et al. 2020, algorithm 2), with the variances in use."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from diffusion_jax.diffusion.broadcasting import Number
from diffusion_jax.diffusion.schedule_base import Schedule
from diffusion_jax.diffusion.solvers import stepping
from diffusion_jax.diffusion.solvers.stepping import Denoise, Noise, Result, Start, Steps
from diffusion_jax.errors import ConfigError

VARIANCES = ("small", "large", "learned")
# What checkpoints call them. The logarithmic ones are the same numbers.
_ALIASES = {
    "fixed_small": "small",
    "fixed_small_log": "small",
    "fixed_large": "large",
    "fixed_large_log": "large",
    "learned_range": "learned",
}


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
    final_noise: bool = False,
    min_variance: Number = 1e-20,
    rounded: tuple[Any, Any] | None = None,
) -> Result:
    """Draws x_s from the posterior q(x_s | x_t, x0) with the denoiser's x0 in place of x0.

    Ho et al. 2020, equations 6 and 7, over any `times`: mean e^-h (sigma_s/sigma_t) x_t +
    alpha_s (1 - e^-2h) x0. `variance` is "small", the posterior's sigma_s^2 (1 - e^-2h); "large",
    sigma_t^2 (1 - e^-2h), which is beta_t on adjacent steps of a beta table; or "learned", between
    their logarithms by the denoiser's `variance_fraction` (Nichol and Dhariwal 2021, equation 15).
    The names in checkpoints, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log" and
    "learned_range", are those three. Uses x0, not eps, of the denoiser; one evaluation and one draw
    a step.

    No noise is added on a step to sigma_s = 0, unless `final_noise`: libraries add it where the
    last step does not start at the table's first entry, and there the variances differ: 0, or
    rather `min_variance`, its floor everywhere, and sigma_t^2.

    `rounded`, (a, b) of [steps] each, for parity: alpha_t^2/alpha_s^2 and beta = 1 - a of each
    step as a library has them in single precision, which loses digits where either is small.

    Raises ConfigError for an unknown variance, a min_variance that is not positive with
    final_noise, a `rounded` of another shape, bad times, or without key and noise.
    """
    kind = _checked(variance, min_variance, final_noise)
    x, denoiser, steps = stepping.prepare(denoise, schedule, times, x)
    xp = steps.xp
    noisy = (steps.sigma_s > 0.0) | final_noise
    to_x, to_x0, large = _coefficients(steps, rounded)
    # The floor is that of the root, so that a traced 0 is never differentiated.
    small = xp.maximum(steps.sigma_ratio * large, float(min_variance) ** 0.5)
    log_ratio = xp.log(xp.where(noisy, small / large, 1.0))
    std = xp.where(noisy, small if kind == "small" else large, 0.0)
    draws = stepping.draws("ddpm", x, len(steps.t), key, noise, noisy)

    def update(x: Array, carry: Any, row: Any) -> Any:
        (t, to_x, to_x0, std, log_ratio), drawn = row
        denoised, carry = denoiser.step(x, t, carry)
        if kind == "learned":
            if denoised.variance_fraction is None:
                raise ConfigError("variance='learned'; this denoiser gives no variance_fraction")
            std = std * jnp.exp((1.0 - denoised.variance_fraction) * log_ratio)
        z = draws.draw(drawn, x.shape, x.dtype)
        return to_x * x + to_x0 * denoised.x0 + std * z, carry

    rows = (stepping.cast(x, steps.t, to_x, to_x0, std, log_ratio), draws.rows(len(steps.t)))
    return stepping.scan_steps(update, x, denoiser.init, rows, trajectory)


def _checked(variance: str, min_variance: Number, final_noise: bool) -> str:
    """The kind of variance, by our name."""
    kind = _ALIASES.get(variance, variance)
    if kind not in VARIANCES:
        raise ConfigError(f"variance={variance!r} is unknown; known: {', '.join(VARIANCES)}")
    if not 0.0 <= min_variance < 1.0 or (final_noise and min_variance == 0.0):
        raise ConfigError(f"min_variance={min_variance}; expected a small number above 0")
    return kind


def _coefficients(steps: Steps, rounded: tuple[Any, Any] | None) -> tuple[Any, Any, Any]:
    """What multiplies x and x0 in equation 7, and the root of the large variance, each [steps]."""
    xp = steps.xp
    if rounded is None:
        large = steps.sigma_t * xp.sqrt(steps.fresh)
        return steps.decay * steps.sigma_ratio, steps.alpha_s * steps.fresh, large
    kept, beta = (np.asarray(values, np.float64) for values in rounded)
    for name, values in (("[0]", kept), ("[1]", beta)):
        if values.shape != steps.t.shape:
            raise ConfigError(
                f"rounded{name} has shape {values.shape}; expected {steps.t.shape}, one a step"
            )
    to_x0 = steps.alpha_s * beta / steps.sigma_t**2
    return xp.sqrt(kept) * steps.sigma_ratio**2, to_x0, xp.sqrt(beta)
