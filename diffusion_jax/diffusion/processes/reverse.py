"""Reverse kernels as a model has them: with a learned variance, and bound to their network.

A Gaussian reverse kernel of learned mean and learned diagonal covariance (Sohl-Dickstein et al.
2015, section 2.2 and appendix D.2.3) is, elementwise and with e^-h as in `processes.gaussian`,

  (1)  p(x_s | x_t) = N(e^-h (sigma_s/sigma_t) x_t + alpha_s (1 - e^-2h) x0_hat, var)
  (2)  log var = f log(sigma_t^2 (1 - e^-2h)) + (1 - f) log(sigma_s^2 (1 - e^-2h)),   sigma_s > 0
  (3)  log var = log(sigma_t^2) + f - 1,                                              sigma_s = 0

x0_hat and the fraction f being what the network gives. f is any real number, so that (2) reaches
every variance; the best one for data of small steps lies between f = 0, the true posterior's, and
f = 1, the forward kernel's (Nichol and Dhariwal 2021, equation 15, where f is kept in [0, 1]).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from diffusion_jax.diffusion.broadcasting import Elements, namespace
from diffusion_jax.diffusion.denoiser import Denoised, Denoiser, as_denoiser
from diffusion_jax.diffusion.processes.gaussian import Gaussian
from diffusion_jax.diffusion.processes.protocol import Distribution, Normal, Process, Time
from diffusion_jax.errors import ConfigError


@dataclass(frozen=True)
class LearnedGaussian(Gaussian):
    """The Gaussian process whose model has kernels (1) to (3); a Process.

    Wherever it takes an x0_hat, that has twice the channels of a state: E[x0 | x_t], then f, on the
    last axis. Unlike `Gaussian`, the kernel of a step to sigma_s = 0 has a width: it is the density
    that the bound ends with.
    """

    variance: str = "learned"

    def __post_init__(self) -> None:
        if self.variance != "learned":
            raise ConfigError(f"variance={self.variance!r}; expected 'learned', or a Gaussian")

    def posterior(self, x_t: Elements, x0_hat: Elements, t: Time, s: Time) -> Normal:
        """p(x_s | x_t) of (1) to (3)."""
        mean, fraction = self._halves(x_t, x0_hat)
        step = self._step(x_t, t, s)
        xp = namespace(x_t, x0_hat, step.sigma_s)
        ended, log_small, rise = self._levels(xp, step)
        last = xp.log(step.sigma_t**2) + fraction - 1.0
        log_variance = xp.where(ended, last, log_small + fraction * rise)
        to_x = step.decay * (step.sigma_s / step.sigma_t)
        return Normal(to_x * x_t + step.alpha_s * step.fresh * mean, xp.exp(0.5 * log_variance))

    def kl(self, x0: Elements, x_t: Elements, x0_hat: Elements, t: Time, s: Time) -> Elements:
        """Nats per element of the state; at sigma_s = 0, -log p(x0 | x_t), a density."""
        mean, fraction = self._halves(x_t, x0_hat)
        step = self._step(x_t, t, s)
        xp = namespace(x_t, x0, x0_hat, step.sigma_s)
        ended, log_small, rise = self._levels(xp, step)
        squared = (x0 - mean) ** 2
        # log(var / posterior's); the branch not taken is kept finite, for its gradient.
        wider = fraction * xp.where(ended, 0.0, rise)
        moved = (step.alpha_s * step.fresh) ** 2 * squared * xp.exp(-log_small - wider)
        inner = 0.5 * (xp.expm1(-wider) + wider + moved)
        width = step.sigma_t * xp.exp(0.5 * (fraction - 1.0))
        return xp.where(ended, -Normal(mean, width).log_prob(x0), inner)

    def _halves(self, x_t: Elements, x0_hat: Elements) -> tuple[Any, Any]:
        size = x_t.shape[-1]
        if x0_hat.shape != (*x_t.shape[:-1], 2 * size):
            raise ConfigError(
                f"x0_hat has shape {x0_hat.shape}; expected {(*x_t.shape[:-1], 2 * size)}: the "
                "estimate and the fraction of the variance"
            )
        return x0_hat[..., :size], x0_hat[..., size:]

    def _levels(self, xp: Any, step: Any) -> tuple[Any, Any, Any]:
        """Whether sigma_s = 0; log of the posterior's variance, and how far it is below the forward
        kernel's; finite placeholders where sigma_s = 0."""
        ended = step.sigma_s <= 0.0
        sigma_s = xp.where(ended, step.sigma_t, step.sigma_s)
        fresh = xp.where(ended, 1.0, step.fresh)
        return ended, xp.log(sigma_s**2 * fresh), 2.0 * xp.log(step.sigma_t / sigma_s)


@dataclass(frozen=True)
class Modelled:
    """A process whose reverse kernels ask a network by themselves; a Process.

    `estimate(x_t, t)` gives what the process takes as x0_hat, of whatever shape that is; the x0_hat
    that is passed in is not read. So bounds and `ancestral`, which hand on E[x0 | x_t] of the shape
    of the state, serve kernels of more parameters: give them any denoiser, such as the identity.
    """

    process: Process
    estimate: Callable[[Any, Any], Any]

    def noise(self, key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        """That of the process."""
        return self.process.noise(key, shape, dtype)

    def forward(self, x0: Elements, t: Time, noise: Elements) -> Elements:
        """That of the process."""
        return self.process.forward(x0, t, noise)

    def posterior(self, x_t: Elements, x0_hat: Elements, t: Time, s: Time) -> Distribution:
        """The model's kernel at `estimate(x_t, t)`."""
        return self.process.posterior(x_t, self.estimate(x_t, t), t, s)

    def prior(self, shape: tuple[int, ...]) -> Distribution:
        """That of the process."""
        return self.process.prior(shape)

    def kl(self, x0: Elements, x_t: Elements, x0_hat: Elements, t: Time, s: Time) -> Elements:
        """The term of the model's kernel at `estimate(x_t, t)`."""
        return self.process.kl(x0, x_t, self.estimate(x_t, t), t, s)

    def prior_kl(self, x0: Elements) -> Elements:
        """That of the process."""
        return self.process.prior_kl(x0)


def with_fraction(denoised: Denoised) -> Any:
    """What `LearnedGaussian` takes as x0_hat: x0 and the fraction of the variance."""
    if denoised.variance_fraction is None:
        raise ConfigError(
            "denoise gives variance_fraction=None; a learned variance needs one: expected a "
            "denoiser of a network with learned_variance=True, or a process Gaussian"
        )
    xp = namespace(denoised.x0)
    return xp.concatenate([denoised.x0, denoised.variance_fraction], axis=-1)


def with_kernels(process: Process, denoise: Any) -> tuple[Process, Any]:
    """The pair to be given to bounds and to `ancestral`, whatever the kernels of the process are.

    A `LearnedGaussian` comes `Modelled` by the denoiser, beside one that need not be asked; the
    denoiser's carry is then fresh at every step. Others pass as they are.
    """
    if not isinstance(process, LearnedGaussian):
        return process, denoise
    known = as_denoiser(denoise)
    return Modelled(process, lambda x, t: with_fraction(known(x, t))), _unread(known)


def _unread(denoise: Denoiser) -> Denoiser:
    return Denoiser(lambda x, t, carry: (Denoised(x), carry), check_start=denoise.check_start)
