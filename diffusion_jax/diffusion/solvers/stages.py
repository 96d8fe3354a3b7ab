"""The inner stages of the explicit Runge-Kutta methods, in the coordinates of `coordinates.py`."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from jaxtyping import Array

from diffusion_jax.diffusion.denoiser import Denoiser
from diffusion_jax.diffusion.schedule_base import Schedule
from diffusion_jax.diffusion.solvers import stepping
from diffusion_jax.diffusion.solvers.coordinates import Coordinates


class Method(NamedTuple):
    """An explicit Runge-Kutta method whose stages see each only the one before.

    With slopes k_1 at (t, y), k_j at (levels[j], y + reach[j] k_(j-1)): y_s = y + sum weights[j]
    k_j. All are [steps], `reach` and `weights` in units of u.
    """

    levels: tuple[Any, ...]
    reach: tuple[Any, ...]
    weights: tuple[Any, ...]


def classical(levels: Coordinates, xp: Any) -> Method:
    """The fourth-order method of four slopes: at t, twice at the middle of u, and at s."""
    step = levels.u_s - levels.u_t
    middle, half = levels.u_t + 0.5 * step, 0.5 * step
    weights = (step / 6.0, step / 3.0, step / 3.0, step / 6.0)
    return Method((middle, middle, levels.u_s), (half, half, step), weights)


def stages_of(
    method: Method, schedule: Schedule, levels: Coordinates, xp: Any, x: Array
) -> tuple[Array, ...]:
    """The rows that `advance` takes, [steps, ...] each, in the type of the steps of x.

    The slopes are summed through the states that they lead to: with x_(j+1) = c (y + reach k_j),

        y + sum w_j k_j = (1 - sum w_j/reach) y + sum w_j/(c reach) x_(j+1) + w_m k_m,

    the sums without the last slope k_m. So a stage reads its own state once and writes the next in
    its place, where XLA would copy a slope that both the sum and the next state read.
    """
    inner = [levels.inner(schedule, xp, u) for u in method.levels]
    shares = [w / reach for w, reach in zip(method.weights, method.reach, strict=False)]
    ahead = [level.c for level in inner]
    one, nothing = xp.ones_like(ahead[0]), xp.zeros_like(ahead[0])
    # What stands for "the next state" of the last stage is its slope.
    to_y = [*ahead[1:], nothing]
    reach = [*(c * r for c, r in zip(ahead[1:], method.reach[1:], strict=True)), one]
    to_x = [r * level.to_slope for r, level in zip(reach, inner, strict=True)]
    to_x0 = [-a * level.c for a, level in zip(to_x, inner, strict=True)]
    into = [*(w / c for w, c in zip(shares, ahead, strict=True)), method.weights[-1]]
    first = ahead[0], ahead[0] * method.reach[0], 1.0 - sum(shares), into[0]
    by_stage = [level.t for level in inner], to_y, to_x, to_x0, into[1:]
    return stepping.cast(x, *first, *(xp.stack(values, axis=1) for values in by_stage))


def advance(
    denoiser: Denoiser, y: Array, slope: Array, carry: Any, row: tuple[Array, ...]
) -> tuple[Array, Any]:
    """y at the end of a step whose slope at its start is known: one evaluation a stage."""
    first_y, first_slope, rest, into, *stages = row

    def stage(state: Any, row: Any) -> Any:
        t, to_y, to_x, to_x0, into = row
        x, total, carry = state
        denoised, carry = denoiser.step(x, t, carry)
        ahead = to_y * y + to_x * x + to_x0 * denoised.x0
        return (ahead, total + into * ahead, carry), None

    x = first_y * y + first_slope * slope
    (_, y_s, carry), _ = jax.lax.scan(stage, (x, rest * y + into * x, carry), tuple(stages))
    return y_s, carry
