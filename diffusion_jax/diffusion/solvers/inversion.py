"""DDIM run upwards: from data to the noise that DDIM takes back to them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion_jax.diffusion.broadcasting import Count
from diffusion_jax.diffusion.schedule_base import Schedule
from diffusion_jax.diffusion.solvers import stepping
from diffusion_jax.diffusion.solvers.ddim import ddim
from diffusion_jax.diffusion.solvers.stepping import Denoise, Result, Start, State
from diffusion_jax.diffusion.time_grids import check_times
from diffusion_jax.errors import ConfigError


class RoundTrip(NamedTuple):
    """What became of data that were inverted and sampled again."""

    x: State
    """The state at the last, noisiest time, [batch, ...]."""
    returned: State
    """The state that DDIM makes of it at times[0], [batch, ...]."""
    error: Float[Array, " batch"]
    """Root mean square of the difference from the data, in units of theirs (of 1 for an example of
    zeros alone), an example."""


def ddim_inversion(
    denoise: Denoise,
    schedule: Schedule,
    times: Any,
    x: Start,
    *,
    trajectory: bool = False,
    iterations: Count = 0,
) -> Result:
    """The state at times[-1] from which DDIM (eta=0) leads back to x at times[0]; times rise.

    x_r = alpha_r x0 + sigma_r eps from s up to r, with x0 and eps of the denoiser at (x_s, s)
    (Song et al. 2021, section 4.3; Dhariwal & Nichol 2021, appendix F), at (x_s, r) where sigma_s =
    0 leaves eps open. DDIM has them at (x_r, r): the round trip has an error of first order.
    `iterations` of x_r = (alpha_r/alpha_s) x_s + (sigma_r - sigma_s alpha_r/alpha_s) eps(x_r, r)
    solve for those instead (Pan et al. 2023, "Effective Real Image Editing with Accelerated
    Iterative Diffusion Inversion"); they converge where steps are small, to the inverse of DDIM.

    Uses x0 and eps of the denoiser, as `ddim` does; altered ones are not inverted. 1 + iterations
    evaluations a step; deterministic. Not in `SOLVERS`, whose times fall.

    Raises ConfigError for times that do not rise strictly within [0, 1], a last time at which the
    denoiser has no x0, or iterations below 0.
    """
    if iterations < 0:
        raise ConfigError(f"iterations={iterations}; expected 0 (explicit) or more")
    # The steps of DDIM, noisiest first, turned over.
    x, denoiser, steps = stepping.prepare(denoise, schedule, falling(times), x)
    xp = steps.xp
    evaluated = xp.where(steps.sigma_s > 0.0, steps.s, steps.t)
    ratio = steps.alpha_t / steps.alpha_s
    to_eps = steps.sigma_t - steps.sigma_s * ratio

    def update(x: Array, carry: Any, row: Any) -> Any:
        t, r, alpha_r, sigma_r, ratio, to_eps, from_data = row
        denoised, carry = denoiser.step(x, t, carry)
        x_r = alpha_r * denoised.x0 + sigma_r * denoised.eps
        # At sigma = 0 the data themselves are x0.
        x_r = jnp.where(from_data > 0.0, ratio * x + to_eps * denoised.eps, x_r)

        def iterate(_: Any, state: Any) -> Any:
            x_r, carry = state
            denoised, carry = denoiser.step(x_r, r, carry)
            return ratio * x + to_eps * denoised.eps, carry

        return jax.lax.fori_loop(0, int(iterations), iterate, (x_r, carry))

    from_data = xp.where(steps.sigma_s > 0.0, 0.0, 1.0)
    levels = (evaluated, steps.t, steps.alpha_t, steps.sigma_t, ratio, to_eps, from_data)
    rows = tuple(row[::-1] for row in stepping.cast(x, *levels))
    return stepping.scan_steps(update, x, denoiser.init, rows, trajectory)


def ddim_round_trip(
    denoise: Denoise, schedule: Schedule, times: Any, x: Start, *, iterations: Count = 0
) -> RoundTrip:
    """Inverts x [batch, ...] at times[0] over the rising `times`, samples it again, and compares.

    Arguments and errors as for `ddim_inversion`.
    """
    x = stepping.start(x)
    noisy: Any = ddim_inversion(denoise, schedule, times, x, iterations=iterations)
    returned: Any = ddim(denoise, schedule, falling(times), noisy)
    axes = tuple(range(1, x.ndim))
    data, again = stepping.cast(x, x, returned)
    missed, size = (jnp.mean(a**2, axes) for a in (again - data, data))
    # Data that are 0 have no unit of their own; theirs is 1.
    return RoundTrip(noisy, returned, jnp.sqrt(missed / jnp.where(size > 0.0, size, 1.0)))


def falling(times: Any) -> np.ndarray:
    """Rising times, noisiest first; ConfigError unless they rise strictly within [0, 1]."""
    rising = np.asarray(times, np.float64)
    if rising.ndim == 1 and len(rising) > 1 and not (np.diff(rising) > 0.0).all():
        k = int(np.argmin(np.diff(rising) > 0.0)) + 1
        raise ConfigError(
            f"times[{k}]={rising[k]} does not lie above times[{k - 1}]={rising[k - 1]}; an "
            "inversion takes strictly increasing times"
        )
    return check_times(rising[::-1])
