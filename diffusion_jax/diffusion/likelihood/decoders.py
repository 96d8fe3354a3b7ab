"""What the cleanest state x_t = alpha x0 + sigma eps says of the data: the last term of a bound.

  Density  p(x0 | x_t) = N(x_t / alpha, sigma^2 / alpha^2)              data with a density
  Pixels   p(x0 = v | x_t) ~ q(x_t | x0 = v) over the values v          data on equal steps

(the latter Kingma et al. 2021, section 3.3). Neither asks the network: at a signal-to-noise ratio
where the state all but shows x0, nothing is left to be learned.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion_jax.errors import ConfigError


@runtime_checkable
class Decoder(Protocol):
    """-log p(x0 | alpha x0 + sigma noise)."""

    def __call__(self, x0: Array, noise: Array, alpha: Any, sigma: Any) -> Array:
        """Nats per element [batch, ...]; alpha and sigma are scalars, the noise standard normal."""
        ...


@dataclasses.dataclass(frozen=True)
class Density:
    """The term of a density, averaged over the noise: log(sigma / alpha) + log(2 pi e) / 2.

    With the exact denoiser the bound exceeds the entropy by what this says too little, of the order
    of (sigma / alpha)^2 over the squared width of the data's finest structure.
    """

    def __call__(self, x0: Array, noise: Array, alpha: Any, sigma: Any) -> Array:
        level = jnp.log(jnp.asarray(sigma / alpha, x0.dtype))
        return jnp.broadcast_to(level + 0.5 * math.log(2.0 * math.pi * math.e), x0.shape)


@dataclasses.dataclass(frozen=True)
class Pixels:
    """Probabilities of `count` values in equal steps from `low` to `high`, their prior uniform.

    ConfigError (a ValueError) for fewer than two values or ends out of order.
    """

    count: int = 256
    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if self.count < 2:
            raise ConfigError(f"count={self.count}; expected at least 2 values")
        if not self.low < self.high:
            raise ConfigError(f"low={self.low}, high={self.high}; expected low < high")

    @property
    def values(self) -> Float[np.ndarray, " count"]:
        """The values that an element may have."""
        return np.linspace(self.low, self.high, self.count)

    def __call__(self, x0: Array, noise: Array, alpha: Any, sigma: Any) -> Array:
        ratio = jnp.asarray(alpha / sigma, x0.dtype)

        def add(total: Array, value: Array) -> tuple[Array, None]:
            # log q(x_t | value) - log q(x_t | x0), which is 0 at the true value.
            distance = ratio * (x0 - value)
            return jnp.logaddexp(total, -distance * (0.5 * distance + noise)), None

        start = jnp.full_like(x0, -jnp.inf)
        # One value at a time: all of them at once would take `count` times the memory.
        return jax.lax.scan(add, start, jnp.asarray(self.values, x0.dtype))[0]
