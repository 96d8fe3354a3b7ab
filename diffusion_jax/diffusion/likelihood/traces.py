"""Divergences of a vector field over examples: exact, or Hutchinson's unbiased estimate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion_jax.diffusion.broadcasting import Count
from diffusion_jax.diffusion.likelihood.arguments import check_count
from diffusion_jax.diffusion.likelihood.discrete import sum_elements
from diffusion_jax.diffusion.solvers import stepping
from diffusion_jax.errors import ConfigError, unknown_name

TRACES = {"rademacher": jax.random.rademacher, "gaussian": jax.random.normal, "exact": None}
"""Ways to the divergence: the draws of Hutchinson's estimate, or none."""

MOST_DIMENSIONS = 4096
"""Beyond this an exact trace is refused: it costs a backward pass for each."""


def probe_vectors(
    x: Float[Array, "batch *shape"], key: Array | None, trace: str, probes: Count
) -> Float[Array, "probes _ *shape"]:
    """[probes, batch, ...] draws of Hutchinson's estimate, or the unit vectors [D, 1, ...].

    Raises:
      ValueError: see `flow_log_density`.
    """
    if trace not in TRACES:
        raise ConfigError(unknown_name("trace", trace, TRACES))
    dimensions = math.prod(x.shape[1:])
    if trace == "exact":
        if dimensions > MOST_DIMENSIONS:
            raise ConfigError(
                f"trace='exact' costs a backward pass for each of {dimensions} dimensions; expected"
                f" at most {MOST_DIMENSIONS}, or 'rademacher'"
            )
        return jnp.eye(dimensions, dtype=x.dtype).reshape(dimensions, 1, *x.shape[1:])
    check_count("probes", probes)
    if key is None:
        raise ConfigError(f"key=None; trace={trace!r} draws vectors: give key, or trace='exact'")
    sampler: Any = TRACES[trace]
    shape = (int(probes), *x.shape[1:])
    keys = stepping.example_keys(key, len(x))
    return jnp.moveaxis(jax.vmap(lambda k: sampler(k, shape, x.dtype))(keys), 1, 0)


def with_divergence(
    field: Callable[[Array], Array], vectors: Array, exact: bool, y: Array
) -> tuple[Array, Array]:
    """field(y) [batch, ...] and its divergence [batch], for a field that mixes no examples."""
    # Backward passes, since a network may have a derivative of its own for these alone.
    value, pull = jax.vjp(field, y)

    def one(total: Array, vector: Array) -> tuple[Array, None]:
        vector = jnp.broadcast_to(vector, y.shape)
        products = vector * pull(vector)[0]
        return total + sum_elements(products), None

    total, _ = jax.lax.scan(one, jnp.zeros(len(y), y.dtype), vectors)
    return value, total if exact else total / len(vectors)
