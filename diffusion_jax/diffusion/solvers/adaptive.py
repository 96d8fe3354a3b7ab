"""Steps chosen by the error: the embedded Runge-Kutta pair of Dormand and Prince, 5(4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from diffusion_jax.diffusion.broadcasting import Count, Number, expand
from diffusion_jax.diffusion.denoiser import Denoiser, as_denoiser
from diffusion_jax.diffusion.schedule_base import Schedule
from diffusion_jax.diffusion.solvers import stepping
from diffusion_jax.diffusion.solvers.coordinates import coordinates_of
from diffusion_jax.diffusion.solvers.stepping import Denoise, Noise, Start
from diffusion_jax.errors import ConfigError

# Dormand and Prince 1980, "A family of embedded Runge-Kutta formulae", table 2: stages 2 to 7, the
# last of which is the fifth-order result; and the difference of the two results.
_NODES = np.array([1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0])
_STAGES = np.array(
    [
        [1 / 5, 0, 0, 0, 0, 0],
        [3 / 40, 9 / 40, 0, 0, 0, 0],
        [44 / 45, -56 / 15, 32 / 9, 0, 0, 0],
        [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729, 0, 0],
        [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656, 0],
        [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84],
    ]
)
_ERROR = np.array([71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40])
# Hairer, Norsett and Wanner, "Solving ODEs I", section II.4.
_SAFETY, _LEAST, _MOST = 0.9, 0.2, 5.0


class _Interval(NamedTuple):
    """The while loop's state: one example's own place and step, each [batch] but for the rest."""

    place: Array
    y: Array
    slope: Array
    step: Array
    carry: Any
    evaluations: Array
    tries: Array


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

    Integrates dy/dlog u = y - x0 in the coordinates of `coordinates.py`, y = x/c. Every example has
    its own steps: one is accepted where the root mean square of error/(atol + rtol |y|) over the
    example is at most 1, y being in units of the data, and the next is 0.9 norm^(-1/5) as long
    within a factor of 5. So a sample does not depend on its batch, which goes on till all are done.
    Fifth order; six evaluations of the batch a try, and one at the start of each interval between
    two of the times; give two or three times for free steps. Deterministic, key and noise unused.

    Where times[-1] has sigma = 0 the integration stops at sigma/alpha = `last_sigma` (EDM's
    smallest), or at times[-2] if that is lower, and one Euler step, the denoiser's x0, ends it;
    elsewhere it ends at times[-1]. `first_step` is the share of an interval that is tried first. An
    example that is not done after `max_tries` tries in an interval is NaN from there on.

    Returns what all solvers return; with `evaluations` a pair of that and the number of evaluations
    of the batch, int32. Not differentiable backwards. A denoiser's carry goes through all
    evaluations, those of rejected tries too.

    Raises ConfigError for tolerances, last_sigma, first_step or max_tries that are not positive,
    bad times or bad coordinates.
    """
    del key, noise
    options = {"rtol": rtol, "atol": atol, "last_sigma": last_sigma, "max_tries": max_tries}
    for name, value in (*options.items(), ("first_step", first_step)):
        if not value > 0.0:
            raise ConfigError(f"{name}={value}; expected a positive number")
    x = stepping.start(x)
    denoiser = as_denoiser(denoise, schedule)
    steps = stepping.steps_of(denoiser, schedule, times)
    levels = coordinates_of(steps, coordinates)
    xp, ends = steps.xp, steps.sigma_s <= 0.0
    lowest = xp.where(levels.flow, last_sigma / (1.0 + last_sigma), last_sigma)
    u_s = xp.where(ends, xp.minimum(lowest, levels.u_t), levels.u_s)
    c_s = xp.where(ends, levels.inner(schedule, xp, u_s).c, levels.c_s)

    slope_at = _slope_of(denoiser, schedule, levels.flow)
    tries = _Tries(slope_at, float(rtol), float(atol), int(max_tries))

    def update(x: Array, history: Any, row: Any) -> Any:
        (start, c_t, stop, c_s, end), ends = row
        carry, count = history
        place = jnp.full(x.shape[:1], start)
        slope, carry = slope_at(place, x / c_t, carry)
        step = jnp.full_like(place, float(first_step) * (stop - start))
        begin = _Interval(place, x / c_t, slope, step, carry, count + 1, jnp.int32(0))
        done = tries.until(begin, stop)
        reached = expand(done.place <= stop, x).astype(bool)
        y = jnp.where(reached, done.y, jnp.nan)
        # With y - slope = x0 an Euler step to sigma = 0 takes no evaluation more.
        y = jnp.where(ends, y - done.slope, y)
        return jnp.where(ends, end, c_s) * y, (done.carry, done.evaluations)

    def init(x: Array) -> Any:
        return denoiser.init(x), jnp.int32(0)

    rows = (stepping.cast(x, xp.log(levels.u_t), levels.c_t, xp.log(u_s), c_s, levels.c_s), ends)
    result, (_, count) = stepping.scan_history(update, x, init, rows, trajectory)
    return (result, count) if evaluations else result


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


class _Tries(NamedTuple):
    """The steps of one interval."""

    slope_at: Callable
    rtol: float
    atol: float
    most: int

    def until(self, begin: _Interval, stop: Array) -> _Interval:
        """Tries steps until every example is at `stop`, or gives up."""

        def unfinished(state: _Interval) -> Array:
            return (state.place > stop).any() & (state.tries < self.most)

        return jax.lax.while_loop(unfinished, lambda state: self._try(state, stop), begin)

    def _try(self, state: _Interval, stop: Array) -> _Interval:
        y, going = state.y, state.place > stop
        last = state.place + state.step <= stop
        step = jnp.where(going, jnp.where(last, stop - state.place, state.step), 0.0)
        slopes = jnp.zeros((7, *y.shape), y.dtype).at[0].set(state.slope)

        def stage(inner: Any, row: Any) -> Any:
            slopes, _, carry = inner
            index, node, weights = row
            ahead = y + expand(step, y) * jnp.tensordot(weights, slopes[:6], 1)
            # A finished example stays where it is; `stop` itself is met without rounding.
            place = jnp.where(going & last & (node == 1.0), stop, state.place + node * step)
            slope, carry = self.slope_at(place, ahead, carry)
            return (slopes.at[index].set(slope), ahead, carry), None

        rows = (jnp.arange(1, 7), *stepping.cast(y, _NODES, _STAGES))
        (slopes, ahead, carry), _ = jax.lax.scan(stage, (slopes, y, state.carry), rows)
        (error_weights,) = stepping.cast(y, _ERROR)
        error = expand(step, y) * jnp.tensordot(error_weights, slopes, 1)
        scale = self.atol + self.rtol * jnp.maximum(jnp.abs(y), jnp.abs(ahead))
        norm = jnp.sqrt(jnp.mean((error / scale) ** 2, tuple(range(1, y.ndim))))
        accepted = going & (norm <= 1.0)
        factor = _SAFETY * jnp.maximum(norm, 1e-10) ** -0.2
        # Not a number where a try left the numbers: that is too long a step as well.
        factor = jnp.clip(jnp.where(jnp.isfinite(factor), factor, _LEAST), _LEAST, _MOST)
        factor = jnp.where(accepted, factor, jnp.minimum(factor, 1.0))
        moved = expand(accepted, y).astype(bool)
        return _Interval(
            jnp.where(accepted, jnp.where(last, stop, state.place + step), state.place),
            jnp.where(moved, ahead, y),
            jnp.where(moved, slopes[6], state.slope),
            jnp.where(going, step * factor, state.step),
            carry,
            state.evaluations + 6,
            state.tries + 1,
        )
