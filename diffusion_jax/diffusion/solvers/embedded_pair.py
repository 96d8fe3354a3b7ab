"""The embedded Runge-Kutta pair of Dormand and Prince, 5(4), stepping every example by its error.

Of an ODE dy/du = slope(u, y) that runs down from u = start to stop < start. A step is accepted
where the root mean square of error/(atol + rtol |y|) over the example, the norm, is at most 1; the
next is 0.9 norm^(-1/5) as long within a factor of 5 (Hairer, Norsett and Wanner, "Solving ODEs I",
section II.4). So an example's steps do not depend on its batch, which goes on till all are done.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from diffusion_jax.diffusion.broadcasting import expand
from diffusion_jax.diffusion.solvers import stepping

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
_SAFETY, _LEAST, _MOST = 0.9, 0.2, 5.0


class Crossing(NamedTuple):
    """What became of an interval."""

    y: Array
    """The state at its end, [batch, ...]; NaN where the tries did not do."""
    slope: Array
    """dy/du there, [batch, ...]."""
    carry: Any
    """What the slope's function carries through its evaluations."""
    evaluations: Array
    """Evaluations of the batch, int32: one at the start, six a try."""


class _Place(NamedTuple):
    """The while loop's state: one example's own place and step, each [batch] but for the rest."""

    place: Array
    y: Array
    slope: Array
    step: Array
    carry: Any
    tries: Array


class EmbeddedPair(NamedTuple):
    """The pair, for one ODE and one tolerance."""

    slope_at: Callable
    """(u [batch], y [batch, ...], carry) -> (dy/du [batch, ...], carry)."""
    rtol: float
    atol: float
    max_tries: int
    first_step: float
    """The share of an interval that is tried first."""

    def cross(self, start: Any, stop: Any, y: Array, carry: Any) -> Crossing:
        """From y [batch, ...] at u = `start` down to `stop`, both scalars."""
        place = jnp.full(y.shape[:1], start)
        slope, carry = self.slope_at(place, y, carry)
        step = jnp.full_like(place, self.first_step * (stop - start))

        def unfinished(state: _Place) -> Array:
            return (state.place > stop).any() & (state.tries < self.max_tries)

        end = jax.lax.while_loop(
            unfinished,
            lambda state: self._try(state, stop),
            _Place(place, y, slope, step, carry, jnp.int32(0)),
        )
        reached = expand(end.place <= stop, y).astype(bool)
        known = jnp.where(reached, end.y, jnp.nan)
        return Crossing(known, end.slope, end.carry, 1 + 6 * end.tries)

    def _try(self, state: _Place, stop: Any) -> _Place:
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
        return _Place(
            jnp.where(accepted, jnp.where(last, stop, state.place + step), state.place),
            jnp.where(moved, ahead, y),
            jnp.where(moved, slopes[6], state.slope),
            jnp.where(going, step * factor, state.step),
            carry,
            state.tries + 1,
        )
