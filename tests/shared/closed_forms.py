"""Exact denoisers, E[x0 | x_t] of data whose density is known; t a scalar or [B]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.diffusion.broadcasting import expand
from diffusion_jax.diffusion.schedule_base import Schedule

Denoise = Callable[[Any, Any], Any]


def gaussian_denoiser(schedule: Schedule, mean: float = 0.4, std: float = 0.6) -> Denoise:
    """Of N(mean, std^2), every element by itself."""

    def denoise(x: Any, t: Any) -> Any:
        alpha, sigma = _levels(schedule, x, t)
        return (sigma**2 * mean + alpha * std**2 * x) / (alpha**2 * std**2 + sigma**2)

    return denoise


def mixture_denoiser(schedule: Schedule, weights: Any, means: Any, stds: Any) -> Denoise:
    """Of the mixture of N(means[k], stds[k]^2) with `weights`, every element by itself."""

    def denoise(x: Any, t: Any) -> Any:
        alpha, sigma = (jnp.asarray(level)[..., None] for level in _levels(schedule, x, t))
        variance = alpha**2 * stds**2 + sigma**2
        centred = x[..., None] - alpha * means
        log_weight = jnp.log(weights) - 0.5 * jnp.log(variance) - 0.5 * centred**2 / variance
        parts = means + alpha * stds**2 / variance * centred
        return (jax.nn.softmax(log_weight) * parts).sum(-1)

    return denoise


def _levels(schedule: Schedule, x: Any, t: Any) -> tuple[Any, Any]:
    return expand(schedule.alpha(t), x), expand(schedule.sigma(t), x)
