"""What all guidance has in common: a guide moved by a rule, an interval of times, a rescaling.

  (1)  (x0, eps) = (x0, eps)_guide + move(x, t, guide, others)

If x = alpha x0 + sigma eps holds for all denoisers, it holds for the result. Guidance may be
limited to an interval of times (Kynkaanniemi et al. 2024), and the spread of x0 be brought back to
that of the guide (Lin et al. 2023, eq. 15-16): with the standard deviation over all axes of an
example,

  (2)  x0 <- x0 (1 - rescale + rescale std(x0_guide) / std(x0))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from diffusion_jax.diffusion.broadcasting import Number, expand
from diffusion_jax.diffusion.denoiser import Denoised, Denoiser, as_denoiser
from diffusion_jax.errors import ConfigError

Branch = Denoiser | Callable[[Any, Any], Any]
"""A denoiser, or a function (x, t) -> x0 or `Denoised`."""

Pair = tuple[Any, Any]
"""(x0, eps), or how far they move; eps is None where the denoisers give none."""

Rule = Callable[[Any, Any, Denoised, Sequence[Denoised], Any], tuple[Pair, Any]]
"""(x, t, guide, others, memory) -> (move, next memory)."""


def _nothing(x: Any) -> Any:
    return ()


def _anywhere(t: float) -> None:
    """Refuses no start."""


def guided(
    guide: Denoiser,
    others: Sequence[Denoiser],
    rule: Rule,
    *,
    interval: Any = (0.0, 1.0),
    rescale: Any = 0.0,
    memory: Callable[[Any], Any] = _nothing,
    check_start: Callable[[float], None] = _anywhere,
) -> Denoiser:
    """The denoiser of (1) and (2).

    Args:
      guide: its variance_fraction is kept.
      others: not evaluated in a step whose times are all outside the interval.
      rule: how far the pair moves. It sees pairs in the type of x.
      interval: (low, high): times low <= t <= high are guided, others are the guide's own.
      rescale: 0 to 1, how far the standard deviation of x0 follows (2). It changes x0 alone, in
        the manner of thresholding: eps keeps the guided direction.
      memory: x -> what the rule carries from step to step, arrays [B, ...]; it stays as it is
        outside the interval.
      check_start: what the rule itself has against a start, within the interval.

    Returns:
      A denoiser that carries a tuple: the carries of the guide and of the others, the memory.

    Raises:
      ValueError: an interval that is empty, or a rescale outside 0 to 1; when the denoiser is
        traced, eps of some of the denoisers alone.
    """
    low, high = check_interval(interval)
    if not is_number(rescale) or not 0.0 <= rescale <= 1.0:
        raise ConfigError(f"rescale={rescale!r} must be from 0 (off) to 1 (full)")
    # All in the type of x, which the branches of a condition must share.
    guide, others = as_denoiser(guide), [as_denoiser(other) for other in others]

    def init(x: Any) -> tuple[Any, ...]:
        return (guide.init(x), *(other.init(x) for other in others), memory(x))

    def step(x: Any, t: Any, carry: Any) -> tuple[Denoised, Any]:
        own, *rest, remembered = carry
        said, own = guide.step(x, t, own)
        inside = None if (low, high) == (0.0, 1.0) else (t >= low) & (t <= high)
        kept = tuple(rest), remembered
        move, rest, remembered = _move(rule, others, said, x, t, kept, inside)
        x0, eps = jax.tree.map(jnp.add, said[:2], move)
        if rescale:
            x0 = _match_std(x0, said.x0, rescale)
        return Denoised(x0, eps, said.variance_fraction), (own, *rest, remembered)

    def check(t: float) -> None:
        guide.check_start(t)
        if low <= t <= high:
            for other in others:
                other.check_start(t)
            check_start(t)

    return Denoiser(step, init, check)


def lifted(name: str, branch: Branch | None) -> Denoiser:
    """The branch as a denoiser; ConfigError naming the argument where there is none."""
    if isinstance(branch, Denoiser):
        return branch
    if not callable(branch):
        raise ConfigError(f"{name}={branch!r}: expected a denoiser, or a function of (x, t)")
    return as_denoiser(branch)


def check_interval(interval: Any) -> tuple[Number, Number]:
    """(low, high); ConfigError unless they are two times with 0 <= low <= high."""
    two = isinstance(interval, Sequence | np.ndarray) and len(interval) == 2
    if not two or not all(map(is_number, interval)) or not 0.0 <= interval[0] <= interval[1]:
        raise ConfigError(f"interval={interval!r} must be two times (low, high), 0 <= low <= high")
    return interval[0], interval[1]


def is_number(value: Any) -> bool:
    """Whether it is a plain number, known before anything is traced."""
    return isinstance(value, Number) and not isinstance(value, bool)


def check_real(name: str, value: Any) -> None:
    """ConfigError unless it is a finite number, or an array of them: a scalar or [B]."""
    array = isinstance(value, jax.Array | np.ndarray)
    good = is_number(value) or (array and value.ndim < 2 and _is_real(value.dtype))
    # What is traced is not looked into.
    if not good or (not isinstance(value, Tracer) and not np.isfinite(value).all()):
        shown = f" of shape {value.shape} and dtype {value.dtype}" if array else f"={value!r}"
        raise ConfigError(f"{name}{shown}: expected a finite number, or an array of them, [B]")


def _is_real(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)


def of_examples(name: str, value: Any, x: Any) -> Any:
    """`value`, a scalar or [B], against states x [B, ...]; ConfigError for another B."""
    if np.ndim(value) and np.shape(value) != np.shape(x)[:1]:
        raise ConfigError(
            f"{name} has shape {np.shape(value)}; expected a scalar or {np.shape(x)[:1]}, one "
            "number an example"
        )
    return expand(value, x)


def _move(
    rule: Rule, others: Sequence[Denoiser], said: Denoised, x: Any, t: Any, kept: Any, inside: Any
) -> tuple[Pair, Any, Any]:
    """The move, the others' carries, the memory; no move, without a call, where no time is
    `inside` (None: all are)."""

    def evaluate(kept: Any) -> tuple[Pair, Any, Any]:
        carries, memory = kept
        steps = [other.step(x, t, c) for other, c in zip(others, carries, strict=True)]
        for other, _ in steps:
            if (said.eps is None) != (other.eps is None):
                raise ConfigError(
                    "eps is None in one of two denoisers: give it in both or neither, as by "
                    "as_denoiser(denoise, schedule)"
                )
        move, after = rule(x, t, said, [denoised for denoised, _ in steps], memory)
        if inside is not None:
            move = jax.tree.map(lambda a: jnp.where(expand(inside, a), a, 0.0), move)
            after = jax.tree.map(lambda a, b: jnp.where(expand(inside, a), a, b), after, memory)
        return move, tuple(carry for _, carry in steps), after

    def skip(kept: Any) -> tuple[Pair, Any, Any]:
        return (jax.tree.map(jnp.zeros_like, tuple(said[:2])), *kept)

    if inside is None:
        return evaluate(kept)
    return jax.lax.cond(jnp.any(inside), evaluate, skip, kept)


def scaled_away(name: str, strength: Any, guide: Denoised, other: Denoised, x: Any) -> Pair:
    """strength (guide - other), of x0 and, where there is one, of eps; `name` is the argument."""
    strength = of_examples(name, strength, x)
    x0, eps = jax.tree.map(lambda a, b: strength * (a - b), guide[:2], other[:2])
    return x0, eps


def _match_std(x0: Any, reference: Any, rescale: Number) -> Any:
    """(2); a constant example, which has no spread to match, stays as it is."""
    axes = tuple(range(1, x0.ndim))
    spread = jnp.std(x0, axis=axes, keepdims=True)
    constant = spread == 0.0
    ratio = jnp.std(reference, axis=axes, keepdims=True) / jnp.where(constant, 1.0, spread)
    return x0 * (1.0 + rescale * (jnp.where(constant, 1.0, ratio) - 1.0))
