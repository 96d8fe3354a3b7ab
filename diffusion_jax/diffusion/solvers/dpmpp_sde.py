"""SDE-DPM-Solver++ and SDE-DPM-Solver (Lu et al. 2022), with noise in every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Array

from diffusion_jax.diffusion.broadcasting import Count
from diffusion_jax.diffusion.schedule_base import Schedule
from diffusion_jax.diffusion.solvers.exponential_plans import Rules
from diffusion_jax.diffusion.solvers.exponential_run import solve_sde, solve_singlestep
from diffusion_jax.diffusion.solvers.stepping import Denoise, Noise, Result, Start


def dpmpp_sde(
    denoise: Denoise,
    schedule: Schedule,
    times: Any,
    x: Start,
    *,
    key: Array | None = None,
    noise: Noise | None = None,
    trajectory: bool = False,
    order: Count | None = None,
    solver_type: str = "midpoint",
    corrected: bool = True,
    lower_order_final: bool = False,
    euler_at_final: bool = False,
) -> Result:
    """SDE-DPM-Solver++, multistep of order 1, 2 (if None) or 3 (Lu et al. 2022, "DPM-Solver++"):

    x_s = e^-h (sigma_s/sigma_t) x_t + alpha_s (1 - e^-2h) D + sigma_s sqrt(1 - e^-2h) z,

    D = x0 for order 1, which is DDPM with the small variance; for order 2 the D of `dpmpp_2m`, or
    with `solver_type="heun"` the exact integral of that line; for order 3, which the paper does not
    have, the exact integral of the parabola, and the first step corrected as in `dpmpp_3m`.
    `corrected=False` is order 3 as libraries have it, with a wrong sign: the drift is of order 1,
    and what is drawn need not get better with more steps. Not the single-step method with a
    midpoint that some libraries call by this name. One evaluation and one draw a step; uses x0, not
    eps. The order is that of the drift, all draws being 0. Start-up rule, `lower_order_final` and
    `euler_at_final` as in `dpmpp_3m`.

    Raises ConfigError for another order or more than there are steps, an unknown solver_type, bad
    times, or without key and noise.
    """
    rules = Rules(solver_type, corrected, lower_order_final, euler_at_final, corrected)
    return solve_sde(
        "sde_x0", "dpmpp_sde", denoise, schedule, times, x, key, noise, trajectory, order, rules
    )


def dpmpp_sde_singlestep(
    denoise: Denoise,
    schedule: Schedule,
    times: Any,
    x: Start,
    *,
    key: Array | None = None,
    noise: Noise | None = None,
    trajectory: bool = False,
    order: Count | None = None,
    solver_type: str = "midpoint",
    corrected: bool = True,
    lower_order_final: bool = False,
    order_list: Sequence[int] | None = None,
) -> Result:
    """SDE-DPM-Solver++ as a single-step method of order 1, 2 (if None) or 3, as libraries have it.

    The groups of `dpmpp_3s`, each step of which goes from the state that begins its group, with the
    integrals and the noise of `dpmpp_sde` over the rise h since then: the states at the inner times
    of a group have noise of their own, which its last does not share. The order is that of the
    drift, all draws being 0; with them the method is of first order. One evaluation and one draw a
    step; uses x0, not eps. `corrected=False` takes order 3 of "heun" with the sign that libraries
    have; other options as in `dpmpp_3s`.

    Raises ConfigError for another order or more than there are steps, an unknown solver_type, a bad
    order_list, bad times, or without key and noise.
    """
    rules = Rules(solver_type, corrected, lower_order_final)
    return solve_singlestep(
        "sde_x0",
        denoise,
        schedule,
        times,
        x,
        trajectory,
        order,
        rules,
        order_list,
        key=key,
        noise=noise,
    )


def dpmsolver_sde(
    denoise: Denoise,
    schedule: Schedule,
    times: Any,
    x: Start,
    *,
    key: Array | None = None,
    noise: Noise | None = None,
    trajectory: bool = False,
    order: Count | None = None,
    solver_type: str = "midpoint",
    lower_order_final: bool = False,
    euler_at_final: bool = False,
) -> Result:
    """SDE-DPM-Solver, multistep of order 1 or 2 (if None) (Lu et al. 2022, "DPM-Solver++"):

    x_s = (alpha_s/alpha_t) x_t - 2 sigma_s (e^h - 1) D + sigma_s sqrt(e^2h - 1) z,

    D being made of eps = (x - alpha x0)/sigma as that of `dpmpp_2m` of x0. The same SDE as
    `dpmpp_sde`, whose step, x_s = alpha_s x0 + sigma_s z, it takes where h is infinite.
    One evaluation and one draw a step; options as in `dpmpp_sde`.

    Raises ConfigError for another order or more than there are steps, an unknown solver_type, bad
    times, or without key and noise.
    """
    rules = Rules(solver_type, True, lower_order_final, euler_at_final)
    return solve_sde(
        "sde_eps",
        "dpmsolver_sde",
        denoise,
        schedule,
        times,
        x,
        key,
        noise,
        trajectory,
        order,
        rules,
    )
