"""Plans: what every step of a multistep or single-step exponential integrator multiplies with."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.diffusion.broadcasting import Count
from diffusion_jax.diffusion.solvers.exponential import (
    Weights,
    before,
    begins,
    finite_rise,
    on_values,
    weights,
)
from diffusion_jax.diffusion.solvers.stepping import Steps
from diffusion_jax.errors import ConfigError, unknown_name

SOLVER_TYPES = ("midpoint", "heun")


class Plan(NamedTuple):
    """What every step multiplies with: x_s = to_x base + sum_j to_m[:, j] m_(k-j).

    `base` is the state of the last step that set `restart`; without `restart`, every step's own.
    """

    to_x: Any
    to_m: Any
    restart: Any = None


class Rules(NamedTuple):
    """The options of a multistep method: see `dpmpp.dpmpp_3m`, and `unipc.unipc` for bh1, bh2.

    `corrected_start` adds the correction of the step that `begins`: see `start_correction`.
    """

    solver_type: str = "midpoint"
    corrected: bool = True
    lower_order_final: bool = False
    euler_at_final: bool = False
    corrected_start: bool = False

    def orders(self, steps: Steps, order: int) -> Any:
        """The order of each step [steps]: that of the history, of the ends and of the options."""
        count = len(steps.t)
        limit = np.minimum(order, np.arange(count) + 1)
        if self.lower_order_final:
            limit = np.minimum(limit, count - np.arange(count))
        if self.euler_at_final:
            limit[-1] = 1
        finite, _ = finite_rise(steps)
        usable, reach = 1, finite
        for q in range(1, order):
            reach = reach & before(steps.xp, finite, q)
            usable = usable + reach
        return steps.xp.minimum(limit, usable)

    def published(self, form: str, order: int, weights: Weights) -> tuple[Any, ...]:
        """w as a method of `order` has it in print."""
        w, scale = weights.w, weights.scale
        if order == 2 and self.solver_type in ("midpoint", "bh2"):
            return (w[0], 0.5 * w[0], *w[2:])
        if order == 2 and self.solver_type == "bh1":
            return (w[0], 0.5 * scale, *w[2:])
        if order == 3 and not self.corrected:
            # The second difference is h^2 m''/2, and is given what belongs to h^2 m''.
            third = _sde_third(weights) if form == "sde_x0" else w[2]
            return (*w[:2], 0.5 * third, *w[3:])
        return w


def _sde_third(weights: Weights) -> Any:
    """w_3 with noise as libraries have it, (1 - e^-2h - 2h)/(2h)^2 - 1/2, where the integral has
    + 1/2."""
    return -(weights.w[1] + 0.5 * weights.scale) / (2.0 * weights.h)


def multistep(form: str, steps: Steps, order: int, rules: Rules) -> Plan:
    """Polynomials through the values of this step and of the order - 1 steps before it."""
    of_step = weights(form, steps)
    back, nodes, columns = 0.0, [], []
    for q in range(1, order + 1):
        columns.append(on_values(rules.published(form, q, of_step), nodes))
        back = back + before(steps.xp, of_step.h, q)
        nodes = [*nodes, -back / of_step.h]
    to_m = select(steps.xp, rules.orders(steps, order), columns)
    if rules.corrected_start and order > 2 and len(steps.t) > 1:
        to_m = to_m + start_correction(form, steps, rules, of_step, order)
    return Plan(of_step.to_x, to_m)


def start_correction(form: str, steps: Steps, rules: Rules, of_step: Weights, count: int) -> Any:
    """What is added to `to_m` [steps, count] where a step starts from a corrected end.

    The first step of finite h, of order 1, has a local error that leaves order 2 of the whole. Once
    the denoiser has seen its end, the line through both values takes the place of the first, as
    UniPC has it: w_2 (m_1 - m_0) more, which the next step multiplies as it does its start.
    """
    xp = steps.xp
    more = xp.where(begins(steps), rules.published(form, 2, of_step)[1], 0.0)
    more = xp.concatenate([0.0 * more[:1], of_step.to_x[1:] * more[:-1]])
    return xp.stack([more, -more] + [0.0 * more] * (count - 2), -1)


def corrector(form: str, steps: Steps, order: int, rules: Rules) -> tuple[Plan, Any]:
    """For every step, the correction of the state it starts from, and whether there is one.

    It is the step before once more, from its own start, with the value at its end.
    """
    xp = steps.xp
    finite, _ = finite_rise(steps)
    of_step = weights(form, steps)
    # Of order 1 it has the one difference that UniP has of order 2.
    implicit = rules.published(form, 2, of_step)
    back, nodes, columns = 0.0, [1.0], []
    for q in range(1, order + 1):
        start, end, *others = on_values(implicit if q == 1 else of_step.w, nodes)
        columns.append([end, start, *others])
        back = back + before(xp, of_step.h, q)
        nodes = [*nodes, -back / of_step.h]
    to_m = select(xp, rules.orders(steps, order), columns)
    possible = xp.where(form == "x0" and rules.solver_type != "bh1", True, finite)
    shifted = [before(xp, value, 1) for value in (of_step.to_x, to_m, possible)]
    return Plan(*shifted[:2]), shifted[2] & (np.arange(len(steps.t)) > 0)


def singlestep(
    form: str, steps: Steps, order_list: Sequence[int], rules: Rules
) -> tuple[Plan, Any]:
    """Polynomials through the values since the start of each group 1, 2, ... of `order_list`, and
    the share of its noise that a step renews if it is stochastic, 1 - e^-2h of the group.

    A step of order q goes from the state q - 1 steps before it, which begins its group. The group
    that begins at alpha_t = 0 begins anew after one step; a step of infinite h is of order 1.
    """
    xp, most = steps.xp, max(order_list)
    finite, h = finite_rise(steps)
    listed = np.asarray(order_list)
    orders = listed
    for q in range(2, most + 1):
        orders = xp.where((listed == q) & ~before(xp, finite, q - 1), q - 1, orders)
    # The last step of a group may be as short as it likes: h is that of the group.
    orders = xp.where(xp.isfinite(steps.rise), orders, 1)
    to_x, fresh, columns = 0.0, 0.0, []
    for q in range(1, most + 1):
        alpha_t, sigma_t = (before(xp, level, q - 1) for level in (steps.alpha_t, steps.sigma_t))
        group = steps._replace(alpha_t=alpha_t, sigma_t=sigma_t)
        of_group = weights(form, group)
        since, nodes = 0.0, []
        for back in range(q - 1, 0, -1):
            since = since + before(xp, h, back)
            nodes.append(since / of_group.h)
        w = of_group.w
        if form == "sde_x0" and not rules.corrected:
            w = (*w[:2], _sde_third(of_group), *w[3:])
        columns.append(_of_type(rules.solver_type, w, nodes)[::-1])
        to_x = xp.where(orders == q, of_group.to_x, to_x)
        fresh = xp.where(orders == q, group.fresh, fresh)
    return Plan(to_x, select(xp, orders, columns), orders == 1), fresh


def _of_type(solver_type: str, w: tuple[Any, ...], nodes: list[Any]) -> list[Any]:
    """What multiplies the values at the start of a group and at the nodes."""
    if solver_type == "midpoint" and len(nodes) == 1:
        return on_values((w[0], 0.5 * w[0]), nodes)
    if solver_type == "midpoint" and len(nodes) == 2:
        # The first value only serves to find the second.
        first, last = on_values(w, nodes[1:])
        return [first, 0.0 * first, last]
    return on_values(w, nodes)


def order_list(order: int, steps: int, lower_order_final: bool) -> list[int]:
    """Groups 1, ..., order, and one of what is left over; of order 3 with one step left over, two
    groups of two at the end, since a step of order 1 would leave order 2 of the whole.

    With `lower_order_final` the published rule: a step of order 1 is left over there, and where
    nothing is left over the last step of all is of order 1.
    """
    groups, left = divmod(steps, order)
    if order == 3 and left == 1 and groups and not lower_order_final:
        return [1, 2, 3] * (groups - 1) + [1, 2] * 2
    orders = [*range(1, order + 1)] * groups + [*range(1, left + 1)]
    if lower_order_final and not left:
        orders[-1] = 1
    return orders


def check_order_list(orders: Sequence[int], steps: int, most: int) -> list[int]:
    """`orders`, or ConfigError unless each is 1 or one more than the one before, at most `most`."""
    listed = list(orders)
    if len(listed) != steps:
        raise ConfigError(f"order_list has {len(listed)} orders; times has {steps} steps")
    previous = 0
    for k, q in enumerate(listed):
        if q not in (1, previous + 1) or q > most:
            raise ConfigError(
                f"order_list[{k}]={q}; expected 1, or one more than the order before, at most "
                f"{most}"
            )
        previous = q
    return listed


def select(xp: ModuleType, orders: Any, columns: Sequence[Sequence[Any]]) -> Any:
    """[steps, longest] coefficients: columns[q - 1] where `orders` is q, then zeros."""
    table = []
    for j in range(max(map(len, columns))):
        column = 0.0 * columns[0][0]
        for q, of_order in enumerate(columns, 1):
            if j < len(of_order):
                column = xp.where(orders == q, of_order[j], column)
        table.append(column)
    return xp.stack(table, -1)


def check_order(order: Count | None, steps: int, most: int = 3) -> int:
    """`order`, or 2 (1 on a grid of one step) for None; ConfigError where it cannot be reached."""
    if order is None:
        return min(2, steps)
    if order not in range(1, most + 1):
        raise ConfigError(f"order={order}; expected a whole number from 1 to {most}")
    if order > steps:
        raise ConfigError(f"order={order} needs as many steps; times has {steps}")
    return int(order)


def check_type(solver_type: str, known: tuple[str, ...] = SOLVER_TYPES) -> None:
    """ConfigError for a solver_type that is not known."""
    if solver_type not in known:
        raise ConfigError(unknown_name("solver_type", solver_type, known))
