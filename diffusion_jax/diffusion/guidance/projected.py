"""Adaptive projected guidance (Sadat et al. 2024).

"Eliminating Oversaturation and Artifacts of High Guidance Scales in Diffusion Models", section 4
and algorithm 1. With the difference d = x0_c - x0_u of a step,

  (1)  m <- d + momentum m                                 (m = 0 before the first step)
  (2)  d <- m min(1, threshold / |m|)
  (3)  d_par = <d, x0_c> / |x0_c|^2 x0_c,  d_orth = d - d_par
  (4)  x0 = x0_c + (w - 1) (d_orth + parallel d_par)

norms and products over all axes of an example. The parallel part is what saturates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

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


def projected(
    conditional: Branch,
    unconditional: Branch | None,
    guidance: Real,
    schedule: Schedule,
    *,
    parallel: Number = 0.0,
    threshold: Number = 0.0,
    momentum: Number = -0.5,
    interval: Sequence[Number] = (0.0, 1.0),
    rescale: Number = 0.0,
) -> Denoiser:
    """The denoiser of (1) to (4); eps moves so that alpha x0 + sigma eps is the same state.

    With parallel=1, threshold=0 and momentum=0 it is `classifier_free`.

    Args:
      conditional: its variance_fraction is kept.
      unconditional: or of a negative prompt.
      guidance: w, a scalar or [B]; may be traced.
      schedule: of the states.
      parallel: 0 to 1, the share of the parallel part that stays.
      threshold: greatest norm of a difference, in units of x0; 0 for none.
      momentum: between -1 and 1; the published values are negative. (1) runs once an evaluation of
        the denoiser, twice a step in solvers that call it twice.
      interval, rescale: as of `classifier_free`; m stays as it is outside the interval.

    Returns:
      A denoiser that carries both carries and m.

    Raises:
      ValueError: an option out of its range; as `classifier_free`.
    """
    conditional = lifted("conditional", conditional)
    unconditional = lifted("unconditional", unconditional)
    check_real("guidance", guidance)
    _check(parallel, threshold, momentum)

    def rule(x: Any, t: Any, guide: Denoised, others: Any, memory: Any) -> tuple[Pair, Any]:
        memory = guide.x0 - others[0].x0 + momentum * memory
        away = memory
        if threshold:
            size = jnp.sqrt(_product(away, away))
            away = away * jnp.minimum(1.0, threshold / jnp.where(size > 0.0, size, 1.0))
        length = _product(guide.x0, guide.x0)
        share = _product(away, guide.x0) / jnp.where(length > 0.0, length, 1.0)
        away = away + (parallel - 1.0) * share * guide.x0
        x0 = of_examples("guidance", guidance - 1.0, x) * away
        return (x0, None if guide.eps is None else _eps(x0, x, t, schedule)), memory

    def memory(x: Any) -> Any:
        return jnp.zeros(jnp.shape(x), jnp.result_type(x))

    limits: Any = {"interval": interval, "rescale": rescale}
    result = guided(conditional, [unconditional], rule, memory=memory, **limits)
    return conditional if is_number(guidance) and guidance == 1.0 else result


def _check(parallel: Number, threshold: Number, momentum: Number) -> None:
    if not is_number(parallel) or not 0.0 <= parallel <= 1.0:
        raise ConfigError(f"parallel={parallel!r} must be from 0 (none) to 1 (all of it)")
    if not is_number(threshold) or not threshold >= 0.0:
        raise ConfigError(f"threshold={threshold!r} must be a norm above 0, or 0 for none")
    if not is_number(momentum) or not -1.0 < momentum < 1.0:
        raise ConfigError(f"momentum={momentum!r} must lie between -1 and 1")


def _product(a: Any, b: Any) -> Any:
    return jnp.sum(a * b, axis=tuple(range(1, jnp.ndim(a))), keepdims=True)


def _eps(x0: Any, x: Any, t: Any, schedule: Schedule) -> Any:
    """How far eps moves with x0 at a state that stays; 0 where sigma is 0."""
    alpha, sigma = expand(schedule.alpha(t), x), expand(schedule.sigma(t), x)
    clean = sigma == 0.0
    ratio = jnp.where(clean, 0.0, alpha / jnp.where(clean, 1.0, sigma))
    return jax.tree.map(lambda move: -ratio * move, x0)
