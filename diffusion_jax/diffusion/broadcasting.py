"""Per-example coefficients against states of any rank, in NumPy or JAX.

Every formula of this package is written once for both: float64 NumPy on the host (solver
coefficients, closed-form tests) and `jax.Array` under `jit`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Real = Float[Array, "..."] | Float[np.ndarray, "..."] | float | int | np.floating
"""A scalar or array of real numbers from either library."""

Number = float | int | np.floating
"""A plain number, known before anything is traced."""


def namespace(*values: Any) -> Any:
    """`jax.numpy` if any of `values` is a JAX array or tracer, else `numpy`."""
    return jnp if any(isinstance(value, jax.Array) for value in values) else np


def expand(value: Real, like: Real) -> Any:
    """Give `value`, a scalar or [B], the trailing axes it needs to multiply `like` of [B, ...].

    A JAX `like` also decides the dtype, so that a float64 host coefficient never widens a float32
    state. A `value` of the rank of `like` or with no axes keeps its shape.

    Raises:
      ValueError: a `value` of any other rank.
    """
    rank = np.ndim(like)
    array: Any = jnp.asarray(value, like.dtype) if isinstance(like, jax.Array) else value
    if np.ndim(array) in (0, rank):
        return array
    if np.ndim(array) != 1:
        raise ValueError(
            f"coefficient of shape {np.shape(value)} does not broadcast over a state of shape "
            f"{np.shape(like)}: pass a scalar or one value per example"
        )
    return array.reshape(array.shape + (1,) * (rank - 1))
