"""Classifier-free guidance of tokens: predictions extrapolated in log-probabilities.

    p(x0 | x_t) ~ p_u(x0 | x_t) (p_c(x0 | x_t) / p_u(x0 | x_t))^w                               (1)

token by token, normalised over the vocabulary, with conditional c, unconditional u and guidance w
(Nisonoff et al. 2024; Schiff et al. 2024, section 3.1, who guide the reverse kernel: of masked
diffusion (1) guides what a mask becomes, and leaves the chance that it goes as it was). Sampling
with (1) draws from no tilted joint distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.diffusion.broadcasting import Number, Real
from diffusion_jax.diffusion.denoiser import Denoised, Denoiser
from diffusion_jax.diffusion.guidance.combining import check_interval
from diffusion_jax.diffusion.processes.categorical import off_zero
from diffusion_jax.errors import ConfigError


def classifier_free_tokens(
    conditional: Denoiser,
    unconditional: Denoiser,
    guidance: Real,
    *,
    interval: Sequence[Number] = (0.0, 1.0),
    rescale: Number = 0.0,
) -> Denoiser:
    """The denoiser of (1); x0 [B, ..., K] are probabilities.

    Args:
      conditional: what guidance 1 is.
      unconditional: what guidance 0 is; evaluated in every step.
      guidance: w, a scalar; may be traced.
      interval: (low, high): times low <= t <= high are guided, others conditional.
      rescale: 0; there is no deviation to be brought back.

    Returns:
      A denoiser that carries the pair of both carries.

    Raises:
      ConfigError: a rescale, or an interval that is empty.
    """
    if rescale:
        raise ConfigError(f"guidance_rescale={rescale}: tokens have no deviation; expected 0")
    low, high = check_interval(interval)

    def init(x: Any) -> tuple[Any, Any]:
        return conditional.init(x), unconditional.init(x)

    def step(x: Any, t: Any, carry: Any) -> tuple[Denoised, Any]:
        guide, carry_c = conditional.step(x, t, carry[0])
        base, carry_u = unconditional.step(x, t, carry[1])
        log_c, log_u = (jnp.log(off_zero(d.x0)) for d in (guide, base))
        weight = jnp.where((t >= low) & (t <= high), guidance, 1.0)
        weight = jnp.reshape(weight, jnp.shape(weight) + (1,) * (log_c.ndim - jnp.ndim(weight)))
        x0 = jax.nn.softmax(log_u + weight * (log_c - log_u), axis=-1)
        return Denoised(x0), (carry_c, carry_u)

    return Denoiser(step, init)
