"""BDIA: a solver that can be run backwards exactly (Zhang et al. 2023, "Exact Diffusion Inversion
via Bidirectional Integration Approximation").

With the x0 and eps of the denoiser at (x_i, t_i), and the states numbered from the data, 0, up,

  (1)  x_(i-1) = D_(i-1) + gamma (x_(i+1) - D_(i+1)),        D_j = alpha_j x0 + sigma_j eps:

DDIM's step down, and gamma times what its step up misses of the state before. Solved for x_(i+1),

  (2)  x_(i+1) = D_(i+1) + (x_(i-1) - D_(i-1))/gamma

is the inverse, with the same evaluation at x_i: two neighbouring states give all others, up to
rounding, for any denoiser. Rounding grows by 1/gamma a step in (2).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from diffusion_jax.diffusion.broadcasting import Number
from diffusion_jax.diffusion.denoiser import Denoiser
from diffusion_jax.diffusion.schedule_base import Schedule
from diffusion_jax.diffusion.solvers import stepping
from diffusion_jax.diffusion.solvers.inversion import ddim_inversion, falling
from diffusion_jax.diffusion.solvers.stepping import Denoise, Noise, Result, Start, State, Steps
from diffusion_jax.errors import ConfigError


class Pair(NamedTuple):
    """Two neighbouring states of BDIA, which determine all others."""

    x: State
    """The state at the time arrived at, [batch, ...]."""
    before: State
    """The state at the time before that, [batch, ...]."""


def bdia(
    denoise: Denoise,
    schedule: Schedule,
    times: Any,
    x: Start,
    *,
    key: Array | None = None,
    noise: Noise | None = None,
    trajectory: bool = False,
    gamma: Number = 1.0,
    second: Start | None = None,
) -> Result:
    """Equation (1) downwards from x at times[0]; the state at times[-1].

    The first step is DDIM, unless `second`, the state at times[1], is given: from `bdia_inversion`,
    it makes this its exact inverse. gamma=0 is DDIM, gamma=1 the time-symmetric method, of second
    order where steps are nearly equal in sigma/alpha and alpha = 1, the leapfrog; like it, weakly
    unstable on a coarse grid, so that the paper takes 0.96 or so for sampling. Uses x0 and eps of
    the denoiser. One evaluation a step; deterministic, key and noise unused. `bdia_pair` returns
    the last two states.

    Raises ConfigError for gamma outside [0, 1], bad times, or a second of another shape.
    """
    del key, noise
    return _down(denoise, schedule, times, x, gamma, second, trajectory)[0]


def bdia_pair(
    denoise: Denoise,
    schedule: Schedule,
    times: Any,
    x: Start,
    *,
    gamma: Number = 1.0,
    second: Start | None = None,
) -> Pair:
    """The states at times[-1] and times[-2] of `bdia`, from which `bdia_inversion` goes back."""
    return _down(denoise, schedule, times, x, gamma, second, False)[1]


def bdia_inversion(
    denoise: Denoise,
    schedule: Schedule,
    times: Any,
    x: Start,
    *,
    gamma: Number = 1.0,
    second: Start | None = None,
) -> Pair:
    """Equation (2) upwards over rising `times`, from x at times[0]; the states at the last two.

    `second` is the state at times[1]; without it, that of DDIM's inversion. Of the result p,
    `bdia(denoise, schedule, times[::-1], p.x, second=p.before, gamma=gamma)` is x up to rounding,
    and of `bdia_pair` this is the inverse. One evaluation a step but the first.

    Raises ConfigError for gamma outside (0, 1], times that do not rise strictly within [0, 1] or
    are fewer than 3, or a second of another shape.
    """
    if not 0.0 < gamma <= 1.0:
        raise ConfigError(f"gamma={gamma}; expected above 0 (which cannot be inverted) to 1")
    fall = falling(times)
    if len(fall) < 3:
        raise ConfigError(f"times has {len(fall)} entries; bdia_inversion takes 3 or more")
    x, denoiser, steps = stepping.prepare(denoise, schedule, fall, x)
    neighbour: Any = second
    if second is None:
        neighbour = ddim_inversion(denoiser, schedule, fall[::-1][:2], x)
    # Upwards, the step that ends at an evaluation's time is the one before it.
    t, alpha, sigma = _levels(steps)
    above, here, below = slice(None, -2), slice(1, -1), slice(2, None)
    share = steps.xp.full_like(t[here], 1.0 / float(gamma))
    coefficients = (t[here], alpha[above], sigma[above], alpha[below], sigma[below], share)
    rows = tuple(row[::-1] for row in stepping.cast(x, *coefficients))
    return _run(denoiser, _like(neighbour, x), x, rows)[0]


def _down(
    denoise: Denoise,
    schedule: Schedule,
    times: Any,
    x: Start,
    gamma: Number,
    second: Start | None,
    trajectory: bool,
) -> tuple[Any, Pair]:
    if not 0.0 <= gamma <= 1.0:
        raise ConfigError(f"gamma={gamma}; expected a number from 0 (DDIM) to 1 (time-symmetric)")
    x, denoiser, steps = stepping.prepare(denoise, schedule, times, x)
    xp, (t, alpha, sigma) = steps.xp, _levels(steps)
    # The first step has no state before it, and a share of 0 of one.
    before = [xp.concatenate([level[:1], level[:-2]]) for level in (alpha, sigma)]
    share = xp.concatenate([xp.zeros(1), xp.full(len(steps.t) - 1, float(gamma))])
    coefficients = (t[:-1], alpha[1:], sigma[1:], *before, share)
    rows = stepping.cast(x, *coefficients)
    if second is None:
        pair, states = _run(denoiser, x, x, rows)
        return _result(pair, x, [x[None], states], trajectory)
    given = _like(second, x)
    pair, states = _run(denoiser, given, x, tuple(row[1:] for row in rows))
    return _result(pair, x, [x[None], given.astype(x.dtype)[None], states], trajectory)


def _run(denoiser: Denoiser, x: Array, before: Array, rows: Any) -> tuple[Pair, Array]:
    """Equation (1) or (2) over the rows; the last two states and all but the first two."""
    dtype = stepping.state_dtype(x)

    def body(state: Any, row: Any) -> Any:
        t, alpha_to, sigma_to, alpha_from, sigma_from, share = row
        x, before, carry = state
        denoised, carry = denoiser.step(x, t, carry)
        missed = before - (alpha_from * denoised.x0 + sigma_from * denoised.eps)
        ahead = alpha_to * denoised.x0 + sigma_to * denoised.eps + share * missed
        return (ahead.astype(dtype), x, carry), ahead.astype(kept)

    kept, first = x.dtype, x.astype(dtype)
    state = (first, before.astype(dtype), denoiser.init(first))
    (x, before, _), states = jax.lax.scan(body, state, rows)
    return Pair(x.astype(kept), before.astype(kept)), states


def _result(pair: Pair, x: Array, states: list[Array], trajectory: bool) -> tuple[Any, Pair]:
    return ((pair.x, jnp.concatenate(states)) if trajectory else pair.x), pair


def _levels(steps: Steps) -> tuple[Any, Any, Any]:
    """(t, alpha, sigma) at all times, each [steps + 1]."""
    xp = steps.xp
    ends = ((steps.t, steps.s), (steps.alpha_t, steps.alpha_s), (steps.sigma_t, steps.sigma_s))
    t, alpha, sigma = (xp.concatenate([starts, last[-1:]]) for starts, last in ends)
    return t, alpha, sigma


def _like(second: Any, x: Array) -> Array:
    second = stepping.start(second)
    if second.shape != x.shape:
        raise ConfigError(f"second has shape {second.shape}; expected {x.shape}, that of x")
    return second.astype(x.dtype)
