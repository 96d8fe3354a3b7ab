"""Classifier-free guidance (Ho & Salimans 2022): two denoisers extrapolated to one.

  (1)  x0  = x0_c  + (w - 1) (x0_c  - x0_u)
  (2)  eps = eps_c + (w - 1) (eps_c - eps_u)

with conditional c, unconditional u and guidance w: 1 is the conditional denoiser, 0 the
unconditional. If x = alpha x0 + sigma eps holds for both, it holds for the result. Guidance may be
limited to an interval of times (Kynkaanniemi et al. 2024), and the spread of x0 be brought back to
that of the conditional denoiser (Lin et al. 2023, eq. 15-16): with the standard deviation over all
axes of an example,

  (3)  x0 <- x0 (1 - rescale + rescale std(x0_c) / std(x0))

The ordinary differential equation of the result does not sample p_u (p_c / p_u)^w.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.diffusion.broadcasting import Number, Real, expand
from diffusion_jax.diffusion.denoiser import Denoised, Denoiser, as_denoiser
from diffusion_jax.errors import ConfigError


def classifier_free(
    conditional: Denoiser,
    unconditional: Denoiser,
    guidance: Real,
    *,
    interval: Sequence[Number] = (0.0, 1.0),
    rescale: Number = 0.0,
) -> Denoiser:
    """The denoiser of (1) and (2) for the guidance w.

    Args:
      conditional: its variance_fraction is kept.
      unconditional: not evaluated in a step whose times are all outside the interval, nor at all if
        `guidance` is the number 1.
      guidance: w, a scalar or [B]; may be traced.
      interval: (low, high): times low <= t <= high are guided, others conditional.
      rescale: 0 to 1, how far the standard deviation of x0 follows (3). It changes x0 alone, in
        the manner of thresholding: eps keeps the guided direction.

    Returns:
      A denoiser that carries the pair of both carries; `conditional` itself for the number 1.

    Raises:
      ValueError: an interval that is empty, or a rescale outside 0 to 1; when the denoiser is
        traced, eps of one of the two alone.
    """
    if len(interval) != 2 or not 0.0 <= interval[0] <= interval[1]:
        raise ConfigError(f"interval={interval!r} must be two times (low, high), 0 <= low <= high")
    low, high = interval
    if not 0.0 <= rescale <= 1.0:
        raise ConfigError(f"rescale={rescale!r} must be from 0 (off) to 1 (full)")
    if isinstance(guidance, Number) and guidance == 1.0:
        return conditional
    # Both in the type of x, which the branches of a condition must share.
    conditional, unconditional = as_denoiser(conditional), as_denoiser(unconditional)

    def init(x: Any) -> tuple[Any, Any]:
        return conditional.init(x), unconditional.init(x)

    def step(x: Any, t: Any, carry: Any) -> tuple[Denoised, Any]:
        guide, carry_c = conditional.step(x, t, carry[0])
        inside = None if (low, high) == (0.0, 1.0) else (t >= low) & (t <= high)
        towards, carry_u = _away(unconditional, guide, x, t, carry[1], inside)
        strength = guidance - 1.0
        strength = expand(strength if inside is None else jnp.where(inside, strength, 0.0), x)
        x0, eps = jax.tree.map(lambda a, away: a + strength * away, guide[:2], towards)
        if rescale:
            x0 = _match_std(x0, guide.x0, rescale)
        return Denoised(x0, eps, guide.variance_fraction), (carry_c, carry_u)

    def check_start(t: float) -> None:
        conditional.check_start(t)
        if low <= t <= high:
            unconditional.check_start(t)

    return Denoiser(step, init, check_start)


def _away(
    unconditional: Denoiser, guide: Denoised, x: Any, t: Any, carry: Any, inside: Any
) -> tuple[tuple[Any, Any], Any]:
    """How (x0, eps) of `guide` differ from the unconditional ones, and the latter's carry; zeros,
    without a call, where no time is `inside` (None: all are)."""

    def evaluate(carry: Any) -> tuple[tuple[Any, Any], Any]:
        base, carry = unconditional.step(x, t, carry)
        if (guide.eps is None) != (base.eps is None):
            raise ConfigError(
                "eps is None in one of conditional and unconditional: give it in both or neither, "
                "as by as_denoiser(denoise, schedule)"
            )
        return jax.tree.map(lambda a, b: a - b, guide[:2], base[:2]), carry

    def skip(carry: Any) -> tuple[tuple[Any, Any], Any]:
        return jax.tree.map(jnp.zeros_like, guide[:2]), carry

    if inside is None:
        return evaluate(carry)
    return jax.lax.cond(jnp.any(inside), evaluate, skip, carry)


def _match_std(x0: Any, reference: Any, rescale: Number) -> Any:
    """(3); a constant example, which has no spread to match, stays as it is."""
    axes = tuple(range(1, x0.ndim))
    spread = jnp.std(x0, axis=axes, keepdims=True)
    constant = spread == 0.0
    ratio = jnp.std(reference, axis=axes, keepdims=True) / jnp.where(constant, 1.0, spread)
    return x0 * (1.0 + rescale * (jnp.where(constant, 1.0, ratio) - 1.0))
