"""Uniform diffusion of tokens.

A token is kept up to time t with probability keep(t), and else replaced by any of the K tokens,
itself included, with equal chance (Hoogeboom et al. 2021; D3PM, Austin et al. 2021, section 3.1):

    q(x_t | x0) = keep(t) [x_t = x0] + (1 - keep(t)) / K                                        (1)

With k = keep(t) / keep(s), Bayes' rule gives the posterior of D3PM, eq. 3, in O(K):

    q(x_s | x_t, x0) = (k [x_s = x_t] + (1 - k) / K) (keep(s) [x_s = x0] + (1 - keep(s)) / K)
                       / (keep(t) [x_t = x0] + (1 - keep(t)) / K)                               (2)

and the model mixes it over the prediction, p(x_s | x_t) = sum over x0 of (2) x0_hat[x0] (eq. 4).
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

from diffusion_jax.diffusion.broadcasting import Elements, expand, namespace
from diffusion_jax.diffusion.processes.categorical import (
    Categorical,
    TokenProcess,
    categorical_kl,
    off_zero,
    one_hot,
    per_token,
)
from diffusion_jax.diffusion.processes.protocol import Time


@dataclass(frozen=True)
class Uniform(TokenProcess):
    """Tokens 0..K-1 that turn into one another; a Process."""

    @property
    def states(self) -> int:
        """K."""
        return self.vocabulary

    def forward(self, x0: Elements, t: Time, noise: Elements) -> Elements:
        """(1): x0 where `noise` is below keep(t), and else what is left of it scaled to 0..K-1; in
        the type of x0."""
        xp = namespace(x0, noise)
        keep, erased = expand(self.schedule.keep(t), x0), expand(self.schedule.erased(t), x0)
        # Below the least normal number nothing is erased; the bound keeps 0/0 out.
        share = (noise - keep) / xp.maximum(erased, 1e-30)
        other = xp.clip(xp.floor(share * self.vocabulary), 0, self.vocabulary - 1)
        return xp.where(noise < keep, x0, xp.asarray(other, x0.dtype))

    def marginal(self, x0: Elements, t: Time) -> Categorical:
        """q(x_t | x0); x0 may also hold probabilities [..., K]."""
        given = self.probabilities(x0)
        tokens = given[..., 0]
        keep, erased = self.schedule.keep(t), self.schedule.erased(t)
        return Categorical(per_token(keep, tokens) * given + self._share(erased, tokens))

    def posterior(self, x_t: Elements, x0_hat: Elements, t: Time, s: Time) -> Categorical:
        """p(x_s | x_t) over K states; x0_hat [..., K], or tokens."""
        predicted = self.probabilities(x0_hat)
        xp = namespace(x_t, predicted)
        seen = one_hot(x_t, self.states, predicted.dtype)
        keep_t, keep_s = self.schedule.keep(t), self.schedule.keep(s)
        kept = keep_t / keep_s
        step = per_token(kept, x_t) * seen + self._share(1.0 - kept, x_t)
        reached = per_token(keep_t, x_t) * seen + self._share(self.schedule.erased(t), x_t)
        weighted = predicted / reached
        total = xp.sum(weighted, axis=-1, keepdims=True)
        before = per_token(keep_s, x_t) * weighted
        before = before + self._share(self.schedule.erased(s), x_t) * total
        return Categorical(step * before)

    def prior(self, shape: tuple[int, ...]) -> Categorical:
        """Every token with chance 1/K."""
        return Categorical(jnp.full((*shape, self.vocabulary), 1.0 / self.vocabulary))

    def kl(self, x0: Elements, x_t: Elements, x0_hat: Elements, t: Time, s: Time) -> Elements:
        """Nats per token; at s=0 it is -log p(x0 | x_t)."""
        true = self.posterior(x_t, x0, t, s).probabilities
        model = self.posterior(x_t, x0_hat, t, s).probabilities
        return categorical_kl(true, off_zero(model))

    def prior_kl(self, x0: Elements) -> Elements:
        """0: nothing is kept to t=1."""
        xp = namespace(x0)
        return xp.zeros(x0.shape, xp.float32 if xp is jnp else xp.float64)

    def _share(self, chance: Time, tokens: Elements) -> Elements:
        """chance / K, against [..., K]."""
        return per_token(chance, tokens) / self.vocabulary
