"""The scan over a plan of an exponential integrator, and the solvers that it makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from diffusion_jax.diffusion.broadcasting import Count
from diffusion_jax.diffusion.denoiser import Denoiser
from diffusion_jax.diffusion.schedule_base import Schedule
from diffusion_jax.diffusion.solvers import stepping
from diffusion_jax.diffusion.solvers.exponential import direct
from diffusion_jax.diffusion.solvers.exponential_plans import (
    Plan,
    Rules,
    check_order,
    check_order_list,
    check_type,
    corrector,
    multistep,
    order_list,
    singlestep,
)
from diffusion_jax.diffusion.solvers.stepping import (
    Denoise,
    Draws,
    Noise,
    Result,
    Start,
    State,
    Steps,
)
from diffusion_jax.errors import ConfigError


def solve_multistep(
    form: str,
    denoise: Denoise,
    schedule: Schedule,
    times: Any,
    x: Start,
    trajectory: bool,
    order: Count | None,
    rules: Rules,
    *,
    any_steps: bool = False,
) -> Result:
    """A deterministic multistep method; with `any_steps` also on fewer steps than `order`."""
    check_type(rules.solver_type)
    x, denoiser, steps = stepping.prepare(denoise, schedule, times, x)
    count = len(steps.t)
    order = check_order(order, max(count, 3) if any_steps else count)
    return run_plan(form, denoiser, steps, x, multistep(form, steps, order, rules), trajectory)


def solve_sde(
    form: str,
    solver: str,
    denoise: Denoise,
    schedule: Schedule,
    times: Any,
    x: Start,
    key: Array | None,
    noise: Noise | None,
    trajectory: bool,
    order: Count | None,
    rules: Rules,
) -> Result:
    """A stochastic multistep method, called `solver` in errors."""
    check_type(rules.solver_type)
    x, denoiser, steps = stepping.prepare(denoise, schedule, times, x)
    order = check_order(order, len(steps.t), 2 if form == "sde_eps" else 3)
    if form == "sde_x0":
        std = steps.sigma_s * steps.xp.sqrt(steps.xp.maximum(steps.fresh, 0.0))
    else:
        xp, finite = steps.xp, direct(form, steps)
        grown = steps.alpha_s * steps.sigma_t / xp.where(finite, steps.alpha_t, 1.0)
        variance = (grown - steps.sigma_s) * (grown + steps.sigma_s)
        # A root that is not taken must have a derivative all the same.
        noisy = finite & (variance > 0.0)
        root = xp.sqrt(xp.where(noisy, variance, 1.0))
        std = xp.where(noisy, root, xp.where(finite, 0.0, steps.sigma_s))
    draws = stepping.draws(solver, x, len(steps.t), key, noise, std > 0.0)
    plan = multistep(form, steps, order, rules)
    return run_plan(form, denoiser, steps, x, plan, trajectory, std, draws)


def solve_singlestep(
    form: str,
    denoise: Denoise,
    schedule: Schedule,
    times: Any,
    x: Start,
    trajectory: bool,
    order: Count | None,
    rules: Rules,
    orders: Sequence[int] | None,
    *,
    any_steps: bool = False,
    key: Array | None = None,
    noise: Noise | None = None,
) -> Result:
    """A single-step method; with `any_steps` also on fewer steps than `order`."""
    check_type(rules.solver_type)
    x, denoiser, steps = stepping.prepare(denoise, schedule, times, x)
    count = len(steps.t)
    if orders is None:
        order = check_order(order, max(count, 3) if any_steps else count)
        listed = order_list(order, count, rules.lower_order_final)
    elif rules.lower_order_final:
        raise ConfigError(
            "lower_order_final=True beside order_list, which gives the last orders too: leave one"
        )
    else:
        listed = check_order_list(orders, count, 3 if order is None else check_order(order, 3))
    plan, fresh = singlestep(form, steps, listed, rules)
    if form != "sde_x0":
        return run_plan(form, denoiser, steps, x, plan, trajectory)
    std = steps.sigma_s * steps.xp.sqrt(steps.xp.maximum(fresh, 0.0))
    draws = stepping.draws("dpmpp_sde_singlestep", x, count, key, noise, std > 0.0)
    return run_plan(form, denoiser, steps, x, plan, trajectory, std, draws)


def run_plan(
    form: str,
    denoiser: Denoiser,
    steps: Steps,
    x: State,
    plan: Plan,
    trajectory: bool,
    std: Any = None,
    draws: Draws | None = None,
) -> Result:
    """The scan over a plan, with `std` [steps] times the draws added."""
    passed_on = None if draws is not None else two_value_rows(form, plan)
    if passed_on is not None:
        return _run_two_values(denoiser, steps, x, passed_on, trajectory)

    def update(x: Array, history: Any, row: Any) -> Any:
        (t, to_x, to_m, std, *levels), slot, restart, drawn = row
        carry, base, past = history
        denoised, carry = denoiser.step(x, t, carry)
        past = stepping.remember(past, predicted(x, denoised.x0, levels), slot)
        base = x if restart is None else jnp.where(restart, x, base)
        x_s = to_x * base + stepping.combined(to_m, past)
        if levels:
            x_s = x_s + levels[-1] * denoised.x0
        if draws is not None:
            x_s = x_s + std * draws.draw(drawn, x.shape, x.dtype)
        return x_s, (carry, base if restart is not None else None, past)

    def init(x: Array) -> Any:
        past = stepping.blank(x, plan.to_m.shape[-1])
        return denoiser.init(x), x if plan.restart is not None else None, past

    noise_level = 0.0 * steps.sigma_s if std is None else std
    to_m, slots = stepping.by_slot(steps, plan.to_m)
    rows = stepping.cast(x, steps.t, plan.to_x, to_m, noise_level, *levels_of(form, steps))
    drawn = None if draws is None else draws.rows(len(steps.t))
    return stepping.scan_steps(update, x, init, (rows, slots, plan.restart, drawn), trajectory)


_MOST_GROWTH = 4.0
"""Of the factor with which `_run_two_values` gets back the last m: its rounding grows with it."""


def two_value_rows(form: str, plan: Plan) -> tuple[Any, ...] | None:
    """What `_run_two_values` multiplies with, of a plan that reads this m and the last; None where
    that would not do, or the weights are not known beforehand."""
    known = isinstance(plan.to_m, np.ndarray) and isinstance(plan.to_x, np.ndarray)
    if not known or plan.to_m.shape[-1] != 2 or plan.restart is not None or "x0" not in form:
        return None
    to_m, before = plan.to_m[:, 0], np.append(plan.to_m[1:, 1], 0.0)
    if plan.to_m[0, 1] != 0.0 or not (np.abs(before) <= _MOST_GROWTH * np.abs(to_m)).all():
        return None
    back = before / np.where(to_m == 0.0, 1.0, to_m)
    return to_m, np.append(plan.to_x[1:], 0.0) + back, back, plan.to_x[0]


def _run_two_values(
    denoiser: Denoiser, steps: Steps, x: State, passed_on: tuple[Any, ...], trajectory: bool
) -> Result:
    """A plan of two values m, with all that a step knows before its evaluation in one array, q:

        x_s = q + w m,    q_s = to_x x_s + w' m = (to_x + w'/w) x_s - (w'/w) q,

    w' being the weight of this m in the next step. Two arrays go from step to step, each written
    where it was read, and not three.
    """
    *columns, first = passed_on

    def update(x: Array, history: Any, row: Any) -> Any:
        carry, q = history
        t, to_m, to_x_s, to_q = row
        denoised, carry = denoiser.step(x, t, carry)
        x_s = q + to_m * denoised.x0
        return x_s, (carry, to_x_s * x_s - to_q * q)

    def init(x: Array) -> Any:
        return denoiser.init(x), stepping.cast(x, first)[0] * x

    return stepping.scan_steps(update, x, init, stepping.cast(x, steps.t, *columns), trajectory)


def run_corrected(
    form: str,
    denoiser: Denoiser,
    steps: Steps,
    x: State,
    order: int,
    rules: Rules,
    asked: Any,
    trajectory: bool,
) -> Result:
    """The scan of UniPC: multistep, and the results of the steps `asked` [steps] corrected once the
    denoiser has seen them. The states are those that it sees."""
    plan = multistep(form, steps, order, rules)
    correction, possible = corrector(form, steps, order, rules)
    asked = steps.xp.asarray(asked)
    corrected = possible & steps.xp.concatenate([asked[:1] & False, asked[:-1]])

    def update(x: Array, history: Any, row: Any) -> Any:
        (t, to_x, to_m, again_x, again_m, *levels), slot, corrected = row
        carry, start, past = history
        denoised, carry = denoiser.step(x, t, carry)
        past = stepping.remember(past, predicted(x, denoised.x0, levels), slot)
        x = jnp.where(corrected, again_x * start + stepping.combined(again_m, past), x)
        x_s = to_x * x + stepping.combined(to_m, past)
        if levels:
            x_s = x_s + levels[-1] * denoised.x0
        return x_s, (carry, x, past)

    def init(x: Array) -> Any:
        return denoiser.init(x), x, stepping.blank(x, order + 1)

    # The correction reads one value more.
    none = 0.0 * plan.to_m[:, :1]
    to_m, slots = stepping.by_slot(steps, steps.xp.concatenate([plan.to_m, none], axis=-1))
    again_m, _ = stepping.by_slot(steps, correction[1])
    columns = (plan.to_x, to_m, correction[0], again_m, *levels_of(form, steps))
    rows = stepping.cast(x, steps.t, *columns), slots, corrected
    return stepping.scan_steps(update, x, init, rows, trajectory)


def levels_of(form: str, steps: Steps) -> tuple[Any, ...]:
    """What `predicted` needs for eps, and what multiplies x0 on a step that is not `direct`."""
    if form in ("x0", "sde_x0"):
        return ()
    alpha_s = steps.xp.where(direct(form, steps), 0.0, steps.alpha_s)
    return steps.alpha_t, steps.sigma_t, alpha_s


def predicted(x: Array, x0: Array, levels: Sequence[Array]) -> Array:
    """m: x0, or the eps that goes with it, so that an x0 that was clipped counts."""
    return (x - levels[0] * x0) / levels[1] if levels else x0
