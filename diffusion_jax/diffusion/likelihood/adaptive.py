"""The steps of the adaptive solver, for an ODE of another state than a solver's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from diffusion_jax.diffusion.broadcasting import Count, Number
from diffusion_jax.diffusion.solvers.embedded_pair import EmbeddedPair


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

    pair = EmbeddedPair(with_carry, float(rtol), float(atol), int(max_tries), float(first_step))
    start, stop = (jnp.asarray(v, y.dtype) for v in (start, stop))
    end = pair.cross(start, stop, y, ())
    return end.y, end.evaluations
