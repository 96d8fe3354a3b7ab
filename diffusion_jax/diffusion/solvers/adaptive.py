"""The adaptive solver: Dormand and Prince's pair on the probability-flow ODE."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from diffusion_jax.diffusion.broadcasting import Count, Number, expand
from diffusion_jax.diffusion.denoiser import Denoiser
from diffusion_jax.diffusion.schedule_base import Schedule
from diffusion_jax.diffusion.solvers import stepping
from diffusion_jax.diffusion.solvers.coordinates import Coordinates, coordinates_of
from diffusion_jax.diffusion.solvers.embedded_pair import EmbeddedPair
from diffusion_jax.diffusion.solvers.stepping import Denoise, Noise, Start, Steps
from diffusion_jax.errors import ConfigError


def dopri5(
    denoise: Denoise,
    schedule: Schedule,
    times: Any,
    x: Start,
    *,
    key: Array | None = None,
    noise: Noise | None = None,
    trajectory: bool = False,
    rtol: Number = 1e-4,
    atol: Number = 1e-5,
    last_sigma: Number = 2e-3,
    first_step: Number = 1e-2,
    max_tries: Count = 1000,
    coordinates: str | None = None,
    evaluations: bool = False,
) -> Any:
    """Adaptive Dormand-Prince 5(4) from times[0] to times[-1]; times between are only visited.

    Integrates dy/dlog u = y - x0 in the coordinates of `coordinates.py`, y = x/c, whose error is
    judged in units of the data. Every example has its own steps; `embedded_pair` says how they are
    chosen by `rtol` and `atol`. Fifth order; six evaluations of the batch a try, and one at the
    start of each interval between two of the times; give two or three times for free steps.
    A Denoiser is given t as [batch], a function as [batch, 1, ...] of the rank of x. Deterministic,
    key and noise unused.

    Where times[-1] has sigma = 0 the integration stops at sigma/alpha = `last_sigma` (EDM's
    smallest), or at times[-2] if that is lower, and one Euler step, the denoiser's x0, ends it;
    elsewhere it ends at times[-1]. `first_step` is the share of an interval that is tried first. An
    example that is not done after `max_tries` tries in an interval is NaN from there on.

    Returns what all solvers return; with `evaluations` a pair of that and the number of evaluations
    of the batch, int32. Not differentiable backwards. A denoiser's carry goes through all
    evaluations, those of rejected tries too.

    Raises ConfigError for tolerances, last_sigma, first_step or max_tries that are not positive,
    a max_tries that is not whole, bad times or bad coordinates.
    """
    del key, noise
    _check_positive(
        rtol=rtol, atol=atol, last_sigma=last_sigma, max_tries=max_tries, first_step=first_step
    )
    if max_tries % 1 != 0:
        raise ConfigError(f"max_tries={max_tries}; expected a whole number of tries")
    if not isinstance(denoise, Denoiser):
        denoise = _broadcasting(denoise)
    x, denoiser, steps = stepping.prepare(denoise, schedule, times, x)
    levels = coordinates_of(steps, coordinates)
    slope_at = _slope_of(denoiser, schedule, levels.flow)
    pair = EmbeddedPair(slope_at, float(rtol), float(atol), int(max_tries), float(first_step))
    rows = _intervals(schedule, steps, levels, last_sigma)
    result, count = _integrate(pair, denoiser, x, rows, trajectory)
    return (result, count) if evaluations else result


def _broadcasting(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """`function` with t as [batch, 1, ...]: its x0 need only broadcast to x, as would one of t."""
    return lambda x, t: function(x, expand(t, x))


def _check_positive(**options: Any) -> None:
    for name, value in options.items():
        if not value > 0.0:
            raise ConfigError(f"{name}={value}; expected a positive number")


def _intervals(
    schedule: Schedule, steps: Steps, levels: Coordinates, last_sigma: Any
) -> tuple[Any, ...]:
    """log u and c at the start and at the end of each integration, c at the end of the step, and
    whether an Euler step to sigma = 0 is between the two, each [steps]."""
    xp, ends = steps.xp, steps.sigma_s <= 0.0
    lowest = xp.where(levels.flow, last_sigma / (1.0 + last_sigma), last_sigma)
    u_s = xp.where(ends, xp.minimum(lowest, levels.u_t), levels.u_s)
    c_s = xp.where(ends, levels.inner(schedule, xp, u_s).c, levels.c_s)
    return xp.log(levels.u_t), levels.c_t, xp.log(u_s), c_s, levels.c_s, ends


def _integrate(
    pair: EmbeddedPair, denoiser: Denoiser, x: Array, rows: tuple[Any, ...], trajectory: bool
) -> tuple[Any, Array]:
    """The result of the scan over the intervals, and the number of evaluations."""

    def update(x: Array, history: Any, row: Any) -> Any:
        (start, c_t, stop, c_s, end), ends = row
        carry, count = history
        reached = pair.cross(start, stop, x / c_t, carry)
        # With y - slope = x0 an Euler step to sigma = 0 takes no evaluation more.
        y = jnp.where(ends, reached.y - reached.slope, reached.y)
        return jnp.where(ends, end, c_s) * y, (reached.carry, count + reached.evaluations)

    def init(x: Array) -> Any:
        return denoiser.init(x), jnp.int32(0)

    *places, ends = rows
    rows = (stepping.cast(x, *places), ends)
    result, (_, count) = stepping.scan_history(update, x, init, rows, trajectory)
    return result, count


def _slope_of(denoiser: Denoiser, schedule: Schedule, flow: Any) -> Callable:
    """(log u [batch], y, carry) -> (dy/dlog u, carry)."""

    def slope(place: Array, y: Array, carry: Any) -> Any:
        # Half the negative logsnr; the floor keeps the start of a flow, u = 1, finite.
        headroom = jnp.log(jnp.maximum(-jnp.expm1(place), 1e-30))
        t = schedule.t_from_logsnr(-2.0 * (place - jnp.where(flow, headroom, 0.0)))
        c = schedule.alpha(t) + jnp.where(flow, schedule.sigma(t), 0.0)
        denoised, carry = denoiser.step(expand(c, y) * y, t, carry)
        return y - denoised.x0, carry

    return slope
