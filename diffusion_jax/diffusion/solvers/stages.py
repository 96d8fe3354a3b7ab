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
    """The rows that `increment` takes, [steps, ...] each, in the type of the steps of x."""
    inner = [levels.inner(schedule, xp, u) for u in method.levels]
    by_stage = (*map(list, zip(*inner, strict=True)), method.reach, method.weights[1:])
    stacked = (xp.stack(values, axis=1) for values in by_stage)
    return stepping.cast(x, method.weights[0], *stacked)


def increment(
    denoiser: Denoiser, y: Array, slope: Array, carry: Any, row: tuple[Array, ...]
) -> tuple[Array, Any]:
    """What a step adds to y, whose slope at its start is known: one evaluation a stage."""
    weight, *stages = row

    def stage(state: Any, row: Any) -> Any:
        t, c, sigma, reach, weight = row
        slope, total, carry = state
        x = c * (y + reach * slope)
        denoised, carry = denoiser.step(x, t, carry)
        slope = (x - c * denoised.x0) / sigma
        return (slope, total + weight * slope, carry), None

    (_, total, carry), _ = jax.lax.scan(stage, (slope, weight * slope, carry), tuple(stages))
    return total, carry
