"""Exponential moving averages of the parameters, several lengths side by side.

    ema <- d_n ema + (1 - d_n) params,    d_n = min(decay, (1 + n) / (10 + n))             (1)

The warm-up in (1) keeps the random initial weights from lingering in the average: after n updates
its length is about n / 9 until `decay` takes over.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

PyTree = Any


def decay_at(updates: Any, decay: float, *, warmup: bool = True) -> Float[Array, ""]:
    """Decay of update number `updates` (counted from 0), equation (1)."""
    n = jnp.asarray(updates, jnp.float32)
    limit = jnp.float32(decay)
    return jnp.minimum(limit, (1.0 + n) / (10.0 + n)) if warmup else limit


def update(
    averages: Mapping[str, PyTree],
    params: PyTree,
    updates: Any,
    decays: Mapping[str, float],
    *,
    warmup: bool = True,
) -> dict[str, PyTree]:
    """Moves every named average one step towards `params`.

    Args:
        averages: `{name: tree like params}`, float32.
        params: current parameters.
        updates: updates made before this one.
        decays: `{name: decay in [0, 1)}`, the same names.
        warmup: whether short averages are used at the start, equation (1).
    """
    result = {}
    for name, tree in averages.items():
        rate = 1.0 - decay_at(updates, decays[name], warmup=warmup)
        result[name] = jax.tree.map(lambda a, p, rate=rate: a + rate * (p - a), tree, params)
    return result
