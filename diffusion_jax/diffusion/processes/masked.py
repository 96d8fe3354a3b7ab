"""Masked (absorbing) diffusion of tokens.

A token is kept up to time t with probability keep(t), and else becomes the mask, the state K:

    q(x_t | x0) = keep(t) [x_t = x0] + (1 - keep(t)) [x_t = mask]                               (1)

(D3PM, Austin et al. 2021, section 3.1 "absorbing state"). A token that is seen at t was there at
s < t; a masked one is still masked at s with probability (1 - keep(s)) / (1 - keep(t)), and else
drawn from the prediction (MDLM, Sahoo et al. 2024, eq. 6 and 7). So the step's divergence is

    KL = (keep(s) - keep(t)) / (1 - keep(t)) * (-log x0_hat[x0])   where x_t is the mask, else 0 (2)

and the limit of infinitely many steps weights the same cross entropy (MDLM, eq. 10; SEDD, Lou et
al. 2024, and Shi et al. 2024, eq. 4, have the same bound) by

    -keep'(t) / (1 - keep(t)).                                                                  (3)

The mask has no probability in x0_hat [..., K], and what is seen is carried over ("SUBS" in MDLM):
that is no property of a network here, but of the process.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

from diffusion_jax.diffusion.broadcasting import Elements, expand, namespace
from diffusion_jax.diffusion.processes.categorical import (
    Categorical,
    TokenProcess,
    at_token,
    off_zero,
    one_hot,
    per_token,
)
from diffusion_jax.diffusion.processes.protocol import Time


@dataclass(frozen=True)
class Masked(TokenProcess):
    """Tokens 0..K-1 that turn into the mask K; a Process."""

    @property
    def mask(self) -> int:
        """The state of a masked token."""
        return self.vocabulary

    @property
    def states(self) -> int:
        """K + 1."""
        return self.vocabulary + 1

    def forward(self, x0: Elements, t: Time, noise: Elements) -> Elements:
        """(1): x0 where `noise` is below keep(t), else the mask; in the type of x0."""
        xp = namespace(x0, noise)
        kept = noise < expand(self.schedule.keep(t), x0)
        return xp.where(kept, x0, xp.asarray(self.mask, x0.dtype))

    def posterior(self, x_t: Elements, x0_hat: Elements, t: Time, s: Time) -> Categorical:
        """p(x_s | x_t) over K + 1 states. x0_hat [..., K], or tokens, is read under masks alone."""
        predicted = self.probabilities(x0_hat)
        xp = namespace(x_t, predicted)
        stay = per_token(self._stay(t, s), x_t)
        held = xp.broadcast_to(stay, (*predicted.shape[:-1], 1))
        open_ = xp.concatenate([(1.0 - stay) * predicted, held], axis=-1)
        seen = one_hot(x_t, self.states, open_.dtype)
        return Categorical(xp.where(x_t[..., None] == self.mask, open_, seen))

    def prior(self, shape: tuple[int, ...]) -> Categorical:
        """Nothing but masks."""
        return Categorical(one_hot(jnp.full(shape, self.mask), self.states))

    def kl(self, x0: Elements, x_t: Elements, x0_hat: Elements, t: Time, s: Time) -> Elements:
        """(2), nats per token; at s=0 it is -log p(x0 | x_t)."""
        return expand(1.0 - self._stay(t, s), x_t) * self._surprise(x0, x_t, x0_hat)

    def kl_rate(self, x0: Elements, x_t: Elements, x0_hat: Elements, t: Time) -> Elements:
        """(3): nats per token and unit of t. Its expectation over x_t, integrated over t from 0 to
        1, is the bound of infinitely many steps on -log p(x0); t is above 0."""
        return expand(self.schedule.rate(t), x_t) * self._surprise(x0, x_t, x0_hat)

    def prior_kl(self, x0: Elements) -> Elements:
        """0: nothing is kept to t=1."""
        xp = namespace(x0)
        return xp.zeros(x0.shape, xp.float32 if xp is jnp else xp.float64)

    def estimate(self, x_t: Elements, x0_hat: Elements) -> Elements:
        """p(x0 | x_t) [..., K]: x0_hat under masks, certainty of what is seen."""
        xp = namespace(x_t, x0_hat)
        seen = one_hot(x_t, self.vocabulary, x0_hat.dtype)
        return xp.where(x_t[..., None] == self.mask, x0_hat, seen)

    def _stay(self, t: Time, s: Time) -> Time:
        """Probability that what is masked at t was so at s."""
        return self.schedule.erased(s) / self.schedule.erased(t)

    def _surprise(self, x0: Elements, x_t: Elements, x0_hat: Elements) -> Elements:
        """-log x0_hat[x0] under masks, else 0."""
        xp = namespace(x0, x_t, x0_hat)
        nats = -xp.log(off_zero(at_token(self.probabilities(x0_hat), x0)))
        return xp.where(x_t == self.mask, nats, 0.0)
