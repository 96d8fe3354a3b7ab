"""Gaussian diffusion: x_t = alpha(t) x0 + sigma(t) eps.

With e^-h = alpha_t sigma_s / (alpha_s sigma_t), the ratio of the signal-to-noise amplitudes of
t and s (0 where alpha_t = 0 or sigma_s = 0), the posterior of Ho et al. 2020, equations 6 and 7, is

    q(x_s | x_t, x0) = N(e^-h (sigma_s/sigma_t) x_t + alpha_s (1 - e^-2h) x0,
                         sigma_s^2 (1 - e^-2h)).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from diffusion_jax.diffusion.broadcasting import Elements, expand, namespace
from diffusion_jax.diffusion.processes.protocol import Normal, Time
from diffusion_jax.diffusion.schedule_base import Schedule
from diffusion_jax.errors import ConfigError


class _Step(NamedTuple):
    """Levels of one step from t to s, broadcastable against the state."""

    alpha_s: Any
    sigma_s: Any
    sigma_t: Any
    decay: Any  # e^-h
    fresh: Any  # 1 - e^-2h


@dataclass(frozen=True)
class Gaussian:
    """The Gaussian process of a schedule; a Process.

    `variance` is that of the model's reverse kernel: "small" is the posterior's own,
    sigma_s^2 (1 - e^-2h), "large" the forward kernel's, sigma_t^2 (1 - e^-2h) (beta_t, where the
    variance is preserved). The prior is N(0, alpha(1)^2 + sigma(1)^2), what data of zero mean and
    unit variance arrives at.
    """

    schedule: Schedule
    variance: str = "small"

    def __post_init__(self) -> None:
        if self.variance not in ("small", "large"):
            raise ConfigError(f"variance={self.variance!r} is unknown; known: large, small")

    def noise(self, key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        """Standard normal."""
        return jax.random.normal(key, shape, dtype)

    def forward(self, x0: Elements, t: Time, noise: Elements) -> Elements:
        """alpha(t) x0 + sigma(t) noise."""
        return expand(self.schedule.alpha(t), x0) * x0 + expand(self.schedule.sigma(t), x0) * noise

    def posterior(self, x_t: Elements, x0_hat: Elements, t: Time, s: Time) -> Normal:
        """p(x_s | x_t); no noise is added on a step to sigma_s = 0, whichever the variance."""
        step = self._step(x_t, t, s)
        xp = namespace(x_t, step.sigma_s)
        mean = step.decay * (step.sigma_s / step.sigma_t) * x_t + step.alpha_s * step.fresh * x0_hat
        level = step.sigma_t if self.variance == "large" else step.sigma_s
        std = xp.where(step.sigma_s > 0.0, level * xp.sqrt(step.fresh), 0.0)
        return Normal(mean, std)

    def prior(self, shape: tuple[int, ...]) -> Normal:
        """N(0, alpha(1)^2 + sigma(1)^2) over float32 arrays of `shape`."""
        return Normal(jnp.zeros(shape), jnp.asarray(self._prior_std(), jnp.float32))

    def kl(self, x0: Elements, x_t: Elements, x0_hat: Elements, t: Time, s: Time) -> Elements:
        """Nats per element. At sigma_s = 0 the posterior has no width left and the term is the
        reconstruction -log N(x0; x0_hat, sigma_t^2), a density, with either variance."""
        step = self._step(x_t, t, s)
        xp = namespace(x_t, x0, step.sigma_s)
        ended = step.sigma_s <= 0.0
        # The placeholder keeps infinities out of the branch not taken, and out of its gradient.
        sigma_s = xp.where(ended, 1.0, step.sigma_s)
        squared = (x0 - x0_hat) ** 2
        level = step.sigma_t if self.variance == "large" else sigma_s
        ratio = (sigma_s / level) ** 2
        width = 0.5 * (ratio - 1.0 - xp.log(ratio))
        inner = width + 0.5 * step.fresh * (step.alpha_s / level) ** 2 * squared
        outer = -Normal(x0_hat, step.sigma_t).log_prob(x0)
        return xp.where(ended, outer, inner)

    def prior_kl(self, x0: Elements) -> Elements:
        """Nats per element: KL(N(alpha(1) x0, sigma(1)^2) || prior)."""
        prior_variance = self._prior_std() ** 2
        ratio = self.schedule.sigma(1.0) ** 2 / prior_variance
        width = ratio - 1.0 - namespace(ratio).log(ratio)
        of_squared = self.schedule.alpha(1.0) ** 2 / prior_variance
        return 0.5 * (expand(of_squared, x0) * x0**2 + expand(width, x0))

    def _prior_std(self) -> Any:
        return (self.schedule.alpha(1.0) ** 2 + self.schedule.sigma(1.0) ** 2) ** 0.5

    def _step(self, x: Elements, t: Time, s: Time) -> _Step:
        alpha_t, sigma_t = self.schedule.alpha(t), self.schedule.sigma(t)
        alpha_s, sigma_s = self.schedule.alpha(s), self.schedule.sigma(s)
        decay = (alpha_t * sigma_s) / (alpha_s * sigma_t)
        fresh = (1.0 - decay) * (1.0 + decay)
        return _Step(*(expand(v, x) for v in (alpha_s, sigma_s, sigma_t, decay, fresh)))
