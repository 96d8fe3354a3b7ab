"""Binomial diffusion of bits (Sohl-Dickstein et al. 2015, appendix B.1 and table App.1).

Each bit is kept up to time t with probability keep(t), and else replaced by a fair coin:

    q(x_t = 1 | x0) = keep(t) x0 + (1 - keep(t))/2

so a step from s to t keeps a bit with probability keep(t)/keep(s): with keep(t) = 1 - t and T equal
steps it erases 1/(T - i + 1) in step i, the paper's choice. Bits are the numbers 0 and 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from diffusion_jax.diffusion.broadcasting import Elements, expand, namespace
from diffusion_jax.diffusion.processes.protocol import Bernoulli, Time


def linear_keep(t: Time) -> Time:
    """1 - t."""
    return 1.0 - t


@dataclass(frozen=True)
class Binomial:
    """Independent bits decaying to fair coins; a Process.

    `keep(t)` falls strictly from 1 at t=0, and stays above 0 before t=1; NumPy in, NumPy out,
    unless it is learned (`LearnedKeep`).
    x0_hat holds the probabilities p(x0 = 1 | x_t) of each bit, and the model's reverse kernel
    marginalises the true posterior over them, bit by bit:

        p(x_s | x_t) = sum over x0 of q(x_s | x_t, x0) p(x0 | x_t).
    """

    keep: Callable[[Any], Any] = linear_keep

    def noise(self, key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        """Uniform in [0, 1); a bit is 1 where the noise is below its probability."""
        return jax.random.uniform(key, shape, dtype)

    def forward(self, x0: Elements, t: Time, noise: Elements) -> Elements:
        """Bits x_t in the floating type of x0."""
        return self.marginal(x0, t).transform(noise)

    def posterior(self, x_t: Elements, x0_hat: Elements, t: Time, s: Time) -> Bernoulli:
        """p(x_s | x_t), by Bayes' rule for either value of x0, mixed by x0_hat."""
        keep_t, keep_s = expand(self.keep(t), x_t), expand(self.keep(s), x_t)
        kept = keep_t / keep_s
        if_one = _posterior_one(x_t, 0.5 * (1.0 + keep_s), kept)
        if_zero = _posterior_one(x_t, 0.5 * (1.0 - keep_s), kept)
        return Bernoulli(if_zero + x0_hat * (if_one - if_zero))

    def prior(self, shape: tuple[int, ...]) -> Bernoulli:
        """Fair coins."""
        return Bernoulli(jnp.full(shape, 0.5))

    def kl(self, x0: Elements, x_t: Elements, x0_hat: Elements, t: Time, s: Time) -> Elements:
        """Nats per element. x0_hat is kept one rounding step off 0 and 1, so that a prediction
        which is certain and wrong costs a finite amount (16 nats in float32)."""
        xp = namespace(x0, x_t, x0_hat)
        edge = np.finfo(xp.result_type(x0_hat, xp.float32)).epsneg
        model = self.posterior(x_t, xp.clip(x0_hat, edge, 1.0 - edge), t, s)
        return _bernoulli_kl(self.posterior(x_t, x0, t, s).mean, model.mean)

    def prior_kl(self, x0: Elements) -> Elements:
        """Nats per element: 0 where keep(1) = 0."""
        end = self.marginal(x0, 1.0).mean
        return _bernoulli_kl(end, namespace(end).full_like(end, 0.5))

    def marginal(self, x0: Elements, t: Time) -> Bernoulli:
        """q(x_t | x0); x0 may also hold probabilities."""
        keep = expand(self.keep(t), x0)
        return Bernoulli(keep * x0 + 0.5 * (1.0 - keep))


def _posterior_one(x_t: Elements, prior_one: Any, kept: Any) -> Elements:
    """p(x_s = 1 | x_t) where p(x_s = 1) = prior_one and the step keeps a bit with `kept`."""
    one = prior_one * (kept * x_t + 0.5 * (1.0 - kept))
    zero = (1.0 - prior_one) * (kept * (1.0 - x_t) + 0.5 * (1.0 - kept))
    return one / (one + zero)


def _bernoulli_kl(q: Elements, p: Elements) -> Elements:
    xp = namespace(q, p)
    return _weighted_log_ratio(xp, q, p) + _weighted_log_ratio(xp, 1.0 - q, 1.0 - p)


def _weighted_log_ratio(xp: Any, q: Elements, p: Elements) -> Elements:
    """q log(q/p), which is 0 at q = 0."""
    return q * xp.log(xp.where(q > 0.0, q, p) / p)
