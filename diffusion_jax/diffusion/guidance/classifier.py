"""Classifier guidance (Dhariwal & Nichol 2021, section 4), of any differentiable log-probability.

With g = the gradient of log p(y | x_t) in x_t, the score of p(x_t | y) is that of p(x_t) plus g:

  (1)  eps = eps - scale sigma g                          (their eq. 14)
  (2)  x0  = x0 + scale sigma^2 / alpha g

A scale of 1 is the posterior of y itself, where the probability is exact; another samples no
tilted distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from diffusion_jax.diffusion.broadcasting import Number, Real, expand
from diffusion_jax.diffusion.denoiser import Denoised, Denoiser
from diffusion_jax.diffusion.guidance.combining import (
    Branch,
    Pair,
    check_real,
    guided,
    is_number,
    lifted,
    of_examples,
)
from diffusion_jax.diffusion.schedule_base import Schedule
from diffusion_jax.errors import ConfigError


def classifier(
    denoise: Branch,
    log_probability: Callable[[Any, Any], Any],
    schedule: Schedule,
    scale: Real = 1.0,
    *,
    interval: Sequence[Number] = (0.0, 1.0),
    rescale: Number = 0.0,
) -> Denoiser:
    """The denoiser of (1) and (2).

    Args:
      denoise: of p(x_t), or guided already; its variance_fraction is kept.
      log_probability: (x [B, ...], t scalar or [B]) -> log p(y | x_t) [B], nats, differentiable in
        x; an additive constant does not matter. One of clean data is made a function of x_t by
        giving it denoise(x, t).x0.
      schedule: of the states.
      scale: a scalar or [B]; may be traced. At the number 0 no gradient is computed.
      interval, rescale: as of `classifier_free`; outside no gradient is computed.

    Returns:
      A denoiser that carries what `denoise` carries; `denoise` itself for the number 0.

    Raises:
      ValueError: as `classifier_free`; a log-probability that is no function; when the denoiser is
        traced, one that is not [B]; from `check_start` of the result, a start where alpha is 0, as
        (2) divides by it.
    """
    denoise = lifted("denoise", denoise)
    if not callable(log_probability):
        raise ConfigError(f"log_probability={log_probability!r}: expected a function of (x, t)")
    check_real("scale", scale)

    def rule(x: Any, t: Any, guide: Denoised, others: Any, memory: Any) -> tuple[Pair, Any]:
        def total(x: Any) -> Any:
            value = jnp.asarray(log_probability(x, t))
            if value.shape != x.shape[:1]:
                raise ConfigError(
                    f"log_probability gives shape {value.shape}; expected {x.shape[:1]}, one "
                    "number an example"
                )
            return value.sum()

        gradient = of_examples("scale", scale, x) * jax.grad(total)(jnp.asarray(x))
        alpha, sigma = expand(schedule.alpha(t), x), expand(schedule.sigma(t), x)
        eps = None if guide.eps is None else (-sigma * gradient).astype(guide.eps.dtype)
        return ((sigma**2 / alpha * gradient).astype(guide.x0.dtype), eps), memory

    def check_start(t: float) -> None:
        alpha = schedule.alpha(t)
        if not isinstance(alpha, Tracer) and alpha == 0.0:
            raise ConfigError(
                f"log_probability leaves x0 open at times[0]={t:g}, where alpha is 0: use a time "
                f"grid that starts below {t:g}, or an interval that ends below it"
            )

    limits: Any = {"interval": interval, "rescale": rescale}
    result = guided(denoise, (), rule, check_start=check_start, **limits)
    return denoise if is_number(scale) and scale == 0.0 else result
