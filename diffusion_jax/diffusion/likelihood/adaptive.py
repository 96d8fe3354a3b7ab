"""The steps of the adaptive solver, for an ODE of another state than a solver's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from diffusion_jax.diffusion.broadcasting import Count, Number, expand
from diffusion_jax.diffusion.solvers import adaptive


def dormand_prince(
    slope_at: Callable[[Array, Array], Array],
    start: Any,
    y: Array,
    stop: Any,
    *,
    rtol: Number = 1e-5,
    atol: Number = 1e-5,
    first_step: Number = 1e-2,
    max_tries: Count = 1000,
) -> tuple[Array, Array]:
    """dy/du = slope_at(u [batch], y [batch, ...]) from u = `start` down to `stop` < `start`.

    Every example has its own steps, those of `solvers.dopri5`; the error is judged in the units of
    y. Returns y, NaN where `max_tries` did not do, and the number of evaluations of the batch.
    """

    def with_carry(place: Array, y: Array, carry: Any) -> Any:
        return slope_at(place, y), carry

    start, stop = (jnp.asarray(v, y.dtype) for v in (start, stop))
    place = jnp.full(y.shape[:1], start)
    step = jnp.full_like(place, float(first_step) * (stop - start))
    begin = adaptive._Interval(place, y, slope_at(place, y), step, (), jnp.int32(1), jnp.int32(0))
    tries = adaptive._Tries(with_carry, float(rtol), float(atol), int(max_tries))
    done = tries.until(begin, stop)
    reached = expand(done.place <= stop, y).astype(bool)
    return jnp.where(reached, done.y, jnp.nan), done.evaluations
