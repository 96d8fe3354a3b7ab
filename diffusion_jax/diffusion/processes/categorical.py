"""Distributions over tokens, and what the processes of tokens have in common.

A token is a whole number, 0..K-1 in the data; a state of K = `vocabulary` tokens [..., K] as
probabilities is the expectation of the one-hot vector. So x0 and x_t are integers of shape
[batch, ...], and x0_hat = p(x0 | x_t) is [batch, ..., K].
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from diffusion_jax.diffusion.broadcasting import Elements, expand, namespace
from diffusion_jax.diffusion.processes.keeping import Keep, LinearKeep, check_keep
from diffusion_jax.diffusion.processes.protocol import Time


class Categorical(NamedTuple):
    """Independent tokens; `probabilities` [..., states] are of sum 1 along the last axis."""

    probabilities: Elements

    @property
    def mean(self) -> Elements:
        """Expectation of the one-hot vectors: the probabilities."""
        return self.probabilities

    def sample(self, key: Array) -> Array:
        p = jnp.asarray(self.probabilities)
        return jnp.asarray(self.transform(jax.random.uniform(key, p.shape[:-1], p.dtype)))

    def transform(self, noise: Elements) -> Elements:
        """The token at which the cumulative probability passes `noise` [...], uniform in [0, 1).

        int32. A token of probability 0 is never taken, whatever the rounding of the sum.
        """
        xp = namespace(self.probabilities, noise)
        p = xp.asarray(self.probabilities)
        cumulative = xp.cumsum(p, axis=-1)
        passed = (cumulative > noise[..., None] * cumulative[..., -1:]) & (p > 0.0)
        # Sums in another order than from left to right need not rise, and may pass by nothing.
        first = xp.where(passed.any(-1), passed.argmax(-1), p.argmax(-1))
        return xp.asarray(first, xp.int32)

    def log_prob(self, x: Elements) -> Elements:
        xp = namespace(self.probabilities, x)
        return xp.log(at_token(self.probabilities, x))


@dataclass(frozen=True)
class TokenProcess:
    """What masked and uniform diffusion share.

    Attributes:
        vocabulary: K, number of tokens in the data, at least 2.
        schedule: how long tokens are kept.

    Raises:
        ValueError: a vocabulary below 2, or a schedule that does not go from 1 to 0.
    """

    vocabulary: int
    schedule: Keep = field(default_factory=LinearKeep)

    def __post_init__(self) -> None:
        if self.vocabulary < 2:
            raise ValueError(f"vocabulary={self.vocabulary}: expected at least 2 tokens")
        check_keep(self.schedule)

    def noise(self, key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        """Uniform in [0, 1), one number a token."""
        return jax.random.uniform(key, shape, dtype)

    def keep(self, t: Time) -> Any:
        """Probability that a token is kept up to t."""
        return self.schedule.keep(t)

    def probabilities(self, x0_hat: Elements) -> Elements:
        """x0_hat [..., K]; tokens [...] become one-hot."""
        if _floating(x0_hat):
            return x0_hat
        return one_hot(x0_hat, self.vocabulary)

    def estimate(self, x_t: Elements, x0_hat: Elements) -> Elements:
        """p(x0 | x_t) [..., K] from what a network predicts, [..., K]: the same."""
        return x0_hat


def one_hot(tokens: Elements, states: int, dtype: Any = None) -> Elements:
    """[..., states] of zeros and a one: float32 of JAX tokens, float64 of NumPy's, by default."""
    xp = namespace(tokens)
    kind = dtype if dtype is not None else (xp.float32 if xp is jnp else xp.float64)
    return xp.asarray(tokens[..., None] == xp.arange(states), kind)


def at_token(probabilities: Elements, tokens: Elements) -> Elements:
    """The probability of each token [...] among [..., states]."""
    xp = namespace(probabilities, tokens)
    index = xp.asarray(tokens)[..., None]
    return xp.take_along_axis(xp.asarray(probabilities), index, axis=-1)[..., 0]


def off_zero(probabilities: Elements) -> Elements:
    """Probabilities kept off 0 by the least normal number, so that what is certain and wrong costs
    a finite amount (87 nats in float32)."""
    xp = namespace(probabilities)
    return xp.maximum(probabilities, np.finfo(xp.result_type(probabilities)).tiny)


def per_token(value: Any, like: Elements) -> Any:
    """A scalar or [batch] against probabilities of the tokens `like` [batch, ...]."""
    return namespace(value, like).asarray(expand(value, like))[..., None]


def categorical_kl(q: Elements, p: Elements) -> Elements:
    """KL(q || p) in nats over the last axis; entries of q may be 0, of p not."""
    xp = namespace(q, p)
    return xp.sum(q * (xp.log(xp.where(q > 0.0, q, 1.0)) - xp.log(p)), axis=-1)


def _floating(x: Elements) -> bool:
    return bool(jnp.issubdtype(namespace(x).result_type(x), jnp.floating))
