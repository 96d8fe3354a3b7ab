"""Per-example coefficients against states of any rank, in NumPy or JAX.

Every formula of this package is written once for both: float64 NumPy on the host (solver
coefficients, closed-form tests) and `jax.Array` under `jit`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
from jaxtyping import Array, Bool

Elements = jaxtyping.Real[Array | np.ndarray, "..."] | Bool[Array | np.ndarray, "..."]
"""An array of real numbers or of bits from either library."""

Count = int | np.integer
"""A whole number, known before anything is traced."""

Number = float | np.floating | Count
"""A plain number, known before anything is traced."""

Real = Elements | Number
"""A scalar or array of real numbers from either library."""


def namespace(*values: Any) -> Any:
    """`jax.numpy` if any of `values` is a JAX array or tracer, else `numpy`."""
    return jnp if any(isinstance(value, jax.Array) for value in values) else np


def floating_type(xp: Any, like: Real) -> Any:
    """The type in which `xp` computes with `like`: its own, or a floating one for whole numbers."""
    dtype = xp.result_type(like)
    return dtype if jnp.issubdtype(dtype, jnp.inexact) else xp.result_type(dtype, xp.float32)


def expand(value: Real, like: Real) -> Any:
    """Give `value`, a scalar or [B], the trailing axes it needs to multiply `like` of [B, ...].

    A JAX `like` also decides the dtype, so that a float64 host coefficient never widens a float32
    state; integers and bits are computed in float32. A `value` of the rank of `like` or with no
    axes keeps its shape.

    Raises:
      ValueError: a `value` of any other rank.
    """
    rank = np.ndim(like)
    array: Any = value
    if isinstance(like, jax.Array):
        array = jnp.asarray(value, floating_type(jnp, like))
    if np.ndim(array) in (0, rank):
        return array
    if np.ndim(array) != 1:
        raise ValueError(
            f"coefficient of shape {np.shape(value)} does not broadcast over a state of shape "
            f"{np.shape(like)}: pass a scalar or one value per example"
        )
    return array.reshape(array.shape + (1,) * (rank - 1))
