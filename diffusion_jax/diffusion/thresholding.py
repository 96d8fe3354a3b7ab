"""Keeping estimates of the data inside its range; the estimate of the noise is left as it was.

  (1)  clip_x0:            x0 <- clip(x0, low, high)
  (2)  dynamic_threshold:  x0 <- clip(x0, -s, s) / s,   s = max(1, quantile of |x0|) per example

Guided estimates leave the range of the data; (2) is what keeps them from saturating (Saharia et al.
2022, "Photorealistic Text-to-Image Diffusion Models", section 2.3).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax.numpy as jnp

from diffusion_jax.diffusion.broadcasting import Number
from diffusion_jax.diffusion.denoiser import Denoised, Denoiser
from diffusion_jax.errors import ConfigError


def clip_x0(denoise: Denoiser, low: Number = -1.0, high: Number = 1.0) -> Denoiser:
    """(1): the denoiser with x0 clipped to [low, high].

    Raises:
      ValueError: low is not below high.
    """
    if not low < high:
        raise ConfigError(f"low={low!r} must be below high={high!r}")
    return _map_x0(denoise, lambda x0: jnp.clip(x0, low, high))


def dynamic_threshold(
    denoise: Denoiser, percentile: Number = 0.995, maximum: Number = math.inf
) -> Denoiser:
    """(2): the denoiser with x0 clipped to its own quantile and scaled, for data in [-1, 1].

    Args:
      denoise: the denoiser to change.
      percentile: the quantile of |x0| over all axes of an example, in (0, 1).
      maximum: s is at most this, >= 1; at 1 it is `clip_x0`, infinite by default.

    Raises:
      ValueError: an argument out of its range.
    """
    if not 0.0 < percentile < 1.0:
        raise ConfigError(f"percentile={percentile!r} must be between 0 and 1 (0.995 in Imagen)")
    if not maximum >= 1.0:
        raise ConfigError(f"maximum={maximum!r} must be >= 1, the range of the data")

    def threshold(x0: Any) -> Any:
        axes = tuple(range(1, x0.ndim))
        limit = jnp.quantile(jnp.abs(x0), percentile, axis=axes, keepdims=True)
        limit = jnp.clip(limit, 1.0, maximum).astype(x0.dtype)
        return jnp.clip(x0, -limit, limit) / limit

    return _map_x0(denoise, threshold)


def _map_x0(denoise: Denoiser, function: Callable[[Any], Any]) -> Denoiser:
    def step(x: Any, t: Any, carry: Any) -> tuple[Denoised, Any]:
        denoised, carry = denoise.step(x, t, carry)
        return denoised._replace(x0=function(denoised.x0)), carry

    return replace(denoise, step=step)
