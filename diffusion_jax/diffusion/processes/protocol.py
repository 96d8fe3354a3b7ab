"""What every noising process offers, and the two distributions that they are made of.

A process runs from data at t=0 to its prior at t=1. Objectives, bounds and ancestral sampling know
only this protocol. Times t and s <= t are scalars or [batch]; x0_hat is E[x0 | x_t], which for
bits is a probability. NumPy float64 arrays in give NumPy float64 out, except where a key is used;
bits may also be given as integers or booleans.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from diffusion_jax.diffusion.broadcasting import Elements, namespace
from diffusion_jax.diffusion.schedule_base import Values as Time


@runtime_checkable
class Distribution(Protocol):
    """A distribution over arrays, independent between elements."""

    @property
    def mean(self) -> Elements:
        """Expectation, elementwise."""
        ...

    def sample(self, key: Array) -> Array:
        """One draw of every element."""
        ...

    def transform(self, noise: Elements) -> Elements:
        """The draw that `noise`, from the `noise` of the process, stands for."""
        ...

    def log_prob(self, x: Elements) -> Elements:
        """Log-density or log-probability of each element, in nats."""
        ...


class Normal(NamedTuple):
    """N(mean, std^2), elementwise; `std` broadcasts against `mean` and may be 0."""

    mean: Elements
    std: Any

    def sample(self, key: Array) -> Array:
        mean = jnp.asarray(self.mean)
        shape = jnp.broadcast_shapes(mean.shape, jnp.shape(self.std))
        return jnp.asarray(self.transform(jax.random.normal(key, shape, mean.dtype)))

    def transform(self, noise: Elements) -> Elements:
        return self.mean + self._width * noise

    def log_prob(self, x: Elements) -> Elements:
        xp, std = namespace(self.mean, self.std, x), self._width
        return -0.5 * ((x - self.mean) / std) ** 2 - xp.log(std * math.sqrt(2.0 * math.pi))

    @property
    def _width(self) -> Any:
        """`std` in the type of a JAX `mean`, which numbers of the host must not widen."""
        if isinstance(self.mean, jax.Array):
            return jnp.asarray(self.std, self.mean.dtype)
        return self.std


class Bernoulli(NamedTuple):
    """1 with probability `mean`, else 0, elementwise."""

    mean: Elements

    def sample(self, key: Array) -> Array:
        mean = jnp.asarray(self.mean)
        return jnp.asarray(self.transform(jax.random.uniform(key, mean.shape, mean.dtype)))

    def transform(self, noise: Elements) -> Elements:
        xp = namespace(self.mean, noise)
        return xp.asarray(noise < self.mean, xp.result_type(self.mean, xp.float32))

    def log_prob(self, x: Elements) -> Elements:
        xp = namespace(self.mean, x)
        return xp.log(xp.where(x > 0.5, self.mean, 1.0 - self.mean))


@runtime_checkable
class Process(Protocol):
    """A noising process. All results are elementwise; sums over elements are the caller's."""

    def noise(self, key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        """Noise for `forward` and for `Distribution.transform`, of `shape`."""
        ...

    def forward(self, x0: Elements, t: Time, noise: Elements) -> Elements:
        """x_t drawn from q(x_t | x0) with the given noise."""
        ...

    def posterior(self, x_t: Elements, x0_hat: Elements, t: Time, s: Time) -> Distribution:
        """The model p(x_s | x_t) that predicts x0_hat; q(x_s | x_t, x0) with x0_hat = x0."""
        ...

    def prior(self, shape: tuple[int, ...]) -> Distribution:
        """Where sampling starts at t=1."""
        ...

    def kl(self, x0: Elements, x_t: Elements, x0_hat: Elements, t: Time, s: Time) -> Elements:
        """KL(q(x_s | x_t, x0) || p(x_s | x_t)), nats per element; -log p(x0 | x_t) at s=0."""
        ...

    def prior_kl(self, x0: Elements) -> Elements:
        """KL(q(x_1 | x0) || prior) in nats per element."""
        ...


@runtime_checkable
class Discrete(Process, Protocol):
    """A process whose states no gradient passes through, but whose probabilities are known."""

    def marginal(self, x0: Elements, t: Time) -> Distribution:
        """q(x_t | x0)."""
        ...
