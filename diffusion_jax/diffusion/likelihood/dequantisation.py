"""From the density of a model to the probability of discrete data.

With noise u uniform in the cube of side w around each value,

  (1)  log P(x0) = log int p(x0 + u) du >= E_u [log p(x0 + u)] + D log w       (Theis et al. 2016)

and with k draws of it the bound is tighter, exact for k -> infinity (Burda et al. 2016; Hoogeboom
et al. 2020):

  (2)  log P(x0) >= E [log (1/k) sum_j p(x0 + u_j)] + D log w
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion_jax.diffusion.broadcasting import Count, Number
from diffusion_jax.diffusion.likelihood.arguments import check_count, check_positive, given_keys
from diffusion_jax.diffusion.solvers import stepping
from diffusion_jax.errors import ConfigError


def bin_width(count: Count, low: Number = -1.0, high: Number = 1.0) -> float:
    """Distance between `count` values in equal steps from `low` to `high`; 2/255 for pixels.

    Raises:
      ValueError: fewer than two values, or ends out of order.
    """
    if count < 2 or not low < high:
        raise ConfigError(f"count={count}, low={low}, high={high}; expected 2 values or more")
    return float(high - low) / (int(count) - 1)


def cell_nats(dimensions: Count, width: Number) -> float:
    """-D log w, what (1) adds to the nats of a density for those of a probability."""
    return -int(dimensions) * math.log(float(width))


def dequantise(
    x0: Float[Array | np.ndarray, "batch *shape"], key: Array, width: Number
) -> Float[Array, "batch *shape"]:
    """`x0` plus noise uniform in [-width/2, width/2), a draw for every element.

    `key` is one key, or one for each example, as for the solvers. ValueError for a width that is
    not positive.
    """
    check_positive("width", width)
    x0 = stepping.start(x0)
    dtype = stepping.compute_dtype(x0)
    keys = given_keys("dequantise", key, len(x0))
    u = jax.vmap(lambda k: jax.random.uniform(k, x0.shape[1:], dtype))(keys)
    return x0.astype(dtype) + float(width) * (u - 0.5)


def dequantised_log_probability(
    log_density: Callable[[Array, Array], Any],
    x0: Float[Array | np.ndarray, "batch *shape"],
    *,
    key: Array,
    width: Number,
    draws: Count = 1,
) -> Float[Array, " batch"]:
    """An estimate whose mean is the bound (2) on log P(x0), nats per example, one scan.

    Args:
      log_density: `(x [batch, ...], keys [batch]) -> [batch]`, nats; exact. An unbiased estimate,
        as by Hutchinson's trace, keeps its mean for draws = 1; for more, its noise raises (2).
      x0: values at distances `width`.
      key: one, or one for each example.
      width: w.
      draws: k.

    Raises:
      ValueError: fewer than one draw, or a width that is not positive.
    """
    check_count("draws", draws)
    x0 = stepping.start(x0)
    keys = given_keys("dequantised_log_probability", key, len(x0))

    def body(total: Array, draw: Array) -> tuple[Array, None]:
        pairs = jax.vmap(lambda k: jax.random.split(jax.random.fold_in(k, draw)))(keys)
        values = log_density(dequantise(x0, pairs[:, 0], width), pairs[:, 1])
        return jnp.logaddexp(total, jnp.asarray(values, total.dtype)), None

    start = jnp.full((len(x0),), -jnp.inf, stepping.compute_dtype(x0))
    total, _ = jax.lax.scan(body, start, jnp.arange(int(draws)))
    return total - math.log(int(draws)) - cell_nats(math.prod(x0.shape[1:]), width)
