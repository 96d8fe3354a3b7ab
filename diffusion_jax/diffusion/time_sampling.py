"""Which noise levels are trained on: times t from numbers u that are uniform in (0, 1).

  (1)  uniform:       t = u                                              (Ho et al. 2020)
  (2)  log_normal:    sigma(t) / alpha(t) = exp(mean + std q(u))         (Karras et al. 2022)
  (3)  logit_normal:  t = logistic(mean + std q(u))                      (Esser et al. 2024, eq. 19)

with q the quantile function of the standard normal distribution. As functions of u they take
stratified numbers as well as independent ones,

  (4)  u_i <- (i + u_i) / B,   i = 0 .. B - 1

which puts one draw into each of B cells: every batch covers all noise levels, and the loss has less
variance (Kingma et al. 2021 do so with one number for the whole batch).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion_jax.diffusion.broadcasting import Number, Real
from diffusion_jax.diffusion.schedule_base import Schedule


def uniform(u: Real, schedule: Schedule) -> Float[Array, "*b"]:
    """(1): t in (0, 1), of the shape of u."""
    return jnp.asarray(u)


def log_normal(
    u: Real, schedule: Schedule, *, mean: Number = -1.2, std: Number = 1.2
) -> Float[Array, "*b"]:
    """(2): t of the shape of u, with log(sigma / alpha) normal; `mean` and `std` in nats.

    Not clipped to the sampling range: an EDM schedule answers with t > 1 beyond its sigma_max. A
    table, which ends at t = 1, holds there. ValueError for a std that is not positive.
    """
    _check_std(std)
    return jnp.asarray(schedule.t_from_logsnr(-2.0 * (mean + std * _normal_quantile(u))))


def logit_normal(
    u: Real, schedule: Schedule, *, mean: Number = 0.0, std: Number = 1.0
) -> Float[Array, "*b"]:
    """(3): t in (0, 1), of the shape of u, with log(t / (1 - t)) normal.

    ValueError for a std that is not positive.
    """
    _check_std(std)
    return jax.nn.sigmoid(mean + std * _normal_quantile(u))


def stratified(u: Real, stratum: Real, batch_size: int) -> Float[Array, "*b"]:
    """(4): one number in each cell of the batch, from independent numbers.

    Args:
      u: [B], uniform in [0, 1).
      stratum: [B], index / batch_size of each example in the global batch: the start of its cell.
      batch_size: B of the whole batch, over which the cells are counted.

    Returns:
      [B], uniform in [0, 1).
    """
    cells = jnp.asarray(stratum + jnp.asarray(u) / batch_size)
    return jnp.minimum(cells, _largest_below_one(cells.dtype))


def _check_std(std: Number) -> None:
    if not std > 0.0:
        raise ValueError(f"std={std}; expected a positive number")


def _normal_quantile(u: Real) -> Array:
    """q(u), finite also at the 0 that generators of uniform numbers may return."""
    numbers = jnp.asarray(u)
    largest = _largest_below_one(numbers.dtype)
    return jax.scipy.special.ndtri(jnp.clip(numbers, 1.0 - largest, largest))


def _largest_below_one(dtype: Any) -> float:
    return 1.0 - float(jnp.finfo(dtype).epsneg)


TIME_SAMPLINGS: dict[str, Callable[..., Array]] = {
    "uniform": uniform,
    "log_normal": log_normal,
    "logit_normal": logit_normal,
}
"""Every time sampling by its name in a config."""
