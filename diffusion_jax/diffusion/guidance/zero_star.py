"""CFG-Zero* (Fan et al. 2025): an optimised scale of the unconditional velocity, a start at rest.

"CFG-Zero*: Improved Classifier-Free Guidance for Flow Matching Models", eq. 10 and algorithm 1.
With the velocity v = eps - x0,

  (1)  s = <v_c, v_u> / |v_u|^2
  (2)  v = s v_u + w (v_c - s v_u)
  (3)  v = 0 in the first steps

products over all axes of an example. Any state x = alpha x0 + sigma eps is one of rectified flow
after division by alpha + sigma, at its time sigma / (alpha + sigma), where v is dx/dt: that is how
a schedule other than theirs is meant, and x / (alpha + sigma) is what rests under (3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from diffusion_jax.diffusion.broadcasting import Number, Real, expand
from diffusion_jax.diffusion.denoiser import Denoised, Denoiser, as_denoiser
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


def cfg_zero(
    conditional: Branch,
    unconditional: Branch | None,
    guidance: Real,
    schedule: Schedule,
    *,
    zero_above: Number = 1.0,
    interval: Sequence[Number] = (0.0, 1.0),
    rescale: Number = 0.0,
) -> Denoiser:
    """The denoiser of (1) to (3).

    Args:
      conditional: its variance_fraction is kept.
      unconditional: or of a negative prompt.
      guidance: w, a scalar or [B]; may be traced.
      schedule: of the states; completes eps where a denoiser gives none.
      zero_above: times above it have velocity 0, (3); 1 for none. times[k] of a grid is the first k
        steps, however often a solver calls the denoiser in one.
      interval, rescale: as of `classifier_free`; (3) too acts within the interval.

    Returns:
      A denoiser that carries both carries; `conditional` itself for the number 1 where
      nothing rests.

    Raises:
      ValueError: zero_above outside 0 to 1; as `classifier_free`.
    """
    conditional = lifted("conditional", conditional)
    unconditional = lifted("unconditional", unconditional)
    check_real("guidance", guidance)
    if not is_number(zero_above) or not 0.0 <= zero_above <= 1.0:
        raise ConfigError(f"zero_above={zero_above!r} must be a time from 0 to 1 (none)")
    # A plain number takes the type of t, in which the times of a grid are themselves rounded.
    rest = float(zero_above)

    def rule(x: Any, t: Any, guide: Denoised, others: Any, memory: Any) -> tuple[Pair, Any]:
        toward, base = (said.eps - said.x0 for said in (guide, others[0]))
        axes = tuple(range(1, jnp.ndim(x)))
        length = jnp.sum(base * base, axis=axes, keepdims=True)
        product = jnp.sum(toward * base, axis=axes, keepdims=True)
        scale = product / jnp.where(length > 0.0, length, 1.0)
        move = of_examples("guidance", guidance - 1.0, x) * (toward - scale * base)
        if rest < 1.0:
            move = jnp.where(expand(t > rest, x), -toward, move)
        alpha, sigma = expand(schedule.alpha(t), x), expand(schedule.sigma(t), x)
        return (-sigma / (alpha + sigma) * move, alpha / (alpha + sigma) * move), memory

    both = [as_denoiser(one, schedule) for one in (conditional, unconditional)]
    result = guided(both[0], both[1:], rule, interval=interval, rescale=rescale)
    plain = is_number(guidance) and guidance == 1.0 and rest == 1.0
    return conditional if plain else result
