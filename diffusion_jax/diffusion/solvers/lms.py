"""The linear multistep method of Katherine Crowson's k-diffusion (`sample_lms`)."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from diffusion_jax.diffusion.broadcasting import Count
from diffusion_jax.diffusion.denoiser import Denoiser
from diffusion_jax.diffusion.schedule_base import Schedule
from diffusion_jax.diffusion.solvers import stepping
from diffusion_jax.diffusion.solvers.coordinates import coordinates_of
from diffusion_jax.diffusion.solvers.stages import advance, classical, stages_of
from diffusion_jax.diffusion.solvers.stepping import Denoise, Noise, Result, Start
from diffusion_jax.errors import ConfigError

# Gauss-Legendre with two points on [0, 1]: exact up to cubics, the integrands of order 4.
_NODES = (0.5 - 0.5 / np.sqrt(3.0), 0.5 + 0.5 / np.sqrt(3.0))


def lms(
    denoise: Denoise,
    schedule: Schedule,
    times: Any,
    x: Start,
    *,
    key: Array | None = None,
    noise: Noise | None = None,
    trajectory: bool = False,
    order: Count | None = None,
    coordinates: str | None = None,
    corrected: bool = False,
) -> Result:
    """Adams-Bashforth on unequal steps: y_s = y_t + sum_j k_j * integral of L_j(u) over the step.

    k_j are the slopes (x - c x0)/sigma at this time and the `order` - 1 before, L_j the Lagrange
    polynomials through their u, integrated exactly. y = x/c, u = sigma/c with c = alpha, or c =
    alpha + sigma where times[0] has alpha < 1e-3 sigma or `coordinates` is "flow". `order` None is
    4, or the number of steps if that is lower.

    One evaluation a step; deterministic, key and noise unused. Start-up rule: step k uses the k + 1
    slopes there are. The error of the first, an Euler step, stays: with many steps all orders above
    1 come down to second order, with a constant far below that of order 2. `corrected` takes the
    first `order` - 1 steps with the classical Runge-Kutta method, `rk4`, at three evaluations more
    each (none on a step to sigma_s = 0): then the order is `order`. A step to sigma_s = 0 is as any
    other, so that the result is not itself an x0 of the denoiser.

    Raises ConfigError for an order outside 1 to 4 or beyond the number of steps, bad times, or bad
    coordinates.
    """
    del key, noise
    x, denoiser, steps = stepping.prepare(denoise, schedule, times, x)
    order = _checked(order, len(steps.t))
    levels = coordinates_of(steps, coordinates)
    weights, slots = stepping.by_slot(steps, adams_weights(steps.xp, levels.u_t, levels.u_s, order))
    ends = stepping.cast(x, steps.t, *levels.ends(steps))
    starts, stages = np.zeros(len(steps.t), bool), None
    if corrected:
        starts = (np.arange(len(steps.t)) < order - 1) & (steps.sigma_s > 0.0)
        stages = stages_of(classical(levels, steps.xp), schedule, levels, steps.xp, x)
    return _run(
        denoiser, x, order, (ends, *stepping.cast(x, weights), slots, starts, stages), trajectory
    )


def _run(denoiser: Denoiser, x: Array, order: int, rows: Any, trajectory: bool) -> Any:
    def update(x: Array, history: Any, row: Any) -> Any:
        (t, c_t, c_s, to_y, to_slope), weights, slot, starts, stages = row
        carry, slopes = history
        denoised, carry = denoiser.step(x, t, carry)
        y, slope = to_y * x, to_slope * (x - c_t * denoised.x0)
        slopes = stepping.remember(slopes, slope, slot)

        def multistep(carry: Any) -> Any:
            return y + stepping.combined(weights, slopes), carry

        def single(carry: Any) -> Any:
            return advance(denoiser, y, slope, carry, stages)

        if stages is None:
            y_s, carry = multistep(carry)
        else:
            y_s, carry = jax.lax.cond(starts, single, multistep, carry)
        return c_s * y_s, (carry, slopes)

    def init(x: Array) -> Any:
        return denoiser.init(x), stepping.blank(x, order)

    return stepping.scan_steps(update, x, init, rows, trajectory)


def _checked(order: Count | None, steps: int) -> int:
    if order is None:
        return min(4, steps)
    if order not in (1, 2, 3, 4):
        raise ConfigError(f"order={order}; expected 1, 2, 3 or 4")
    if order > steps:
        raise ConfigError(f"order={order} needs as many steps, times has {steps}: lower the order")
    return int(order)


def adams_weights(xp: Any, u_t: Any, u_s: Any, order: int) -> Any:
    """[steps, order]: integrals over u_t..u_s of the Lagrange polynomials through u_t, the u before
    it, and so on; 0 for those before the first step, which the others do without."""
    step = u_s - u_t
    # Places in units of the step: this time at 0, its end at 1; the first `i` steps lack place i.
    place = [
        (xp.concatenate([xp.zeros_like(u_t[:i]), u_t[: len(u_t) - i]]) - u_t)
        / xp.where(step == 0.0, 1.0, step)
        for i in range(order)
    ]
    there = [np.arange(len(u_t)) >= i for i in range(order)]
    columns = []
    for j in range(order):
        total = 0.0
        for node in _NODES:
            product = xp.ones_like(step)
            for i in range(order):
                if i != j:
                    both = there[i] & there[j]
                    gap = xp.where(both, place[j] - place[i], 1.0)
                    product = product * xp.where(there[i], (node - place[i]) / gap, 1.0)
            total = total + 0.5 * product
        columns.append(xp.where(there[j], step * total, 0.0))
    return xp.stack(columns, axis=1)
