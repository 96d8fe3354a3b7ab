"""DPM-Solver++ (Lu et al. 2022): the multistep and single-step ODE solvers of orders 1 to 3.

All integrate equation (2) of `exponential`, polynomials in log(alpha/sigma) through values of the
denoiser's x0, with one evaluation a step. They use x0, not eps, of the denoiser.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Array

from diffusion_jax.diffusion.schedule_base import Schedule
from diffusion_jax.diffusion.solvers.exponential_plans import Rules
from diffusion_jax.diffusion.solvers.exponential_run import solve_multistep, solve_singlestep
from diffusion_jax.diffusion.solvers.stepping import Denoise, Noise, Result, Start


def dpmpp_1m(
    denoise: Denoise,
    schedule: Schedule,
    times: Any,
    x: Start,
    *,
    key: Array | None = None,
    noise: Noise | None = None,
    trajectory: bool = False,
) -> Result:
    """DPM-Solver++ of order 1: x_s = (sigma_s/sigma_t) x_t + alpha_s (1 - e^-h) x0.

    Lu et al. 2022, "DPM-Solver++"; DDIM with eta=0 unless x0 was altered, and `euler`. One
    evaluation a step; deterministic, key and noise unused.

    Raises ConfigError for bad times.
    """
    del key, noise
    return solve_multistep("x0", denoise, schedule, times, x, trajectory, 1, Rules())


def dpmpp_2m(
    denoise: Denoise,
    schedule: Schedule,
    times: Any,
    x: Start,
    *,
    key: Array | None = None,
    noise: Noise | None = None,
    trajectory: bool = False,
    solver_type: str = "midpoint",
    lower_order_final: bool = False,
    euler_at_final: bool = False,
) -> Result:
    """DPM-Solver++(2M): x_s = (sigma_s/sigma_t) x_t + alpha_s (1 - e^-h) D with

        D = x0 + h/(2 h_previous) (x0 - x0_previous).

    Lu et al. 2022, "DPM-Solver++", algorithm 2; `solver_type="heun"` integrates the line through
    both x0 exactly instead, with alpha_s (e^-h - 1 + h)/h in place of alpha_s (1 - e^-h)/2.
    Second order; one evaluation a step; deterministic, key and noise unused.

    Start-up rule: the first step, steps whose own h is infinite (from alpha_t = 0, or to
    sigma_s = 0) and the step after an infinite h are of order 1. `lower_order_final` and
    `euler_at_final` are those of `dpmpp_3m`.

    Raises ConfigError for an unknown solver_type or bad times.
    """
    del key, noise
    rules = Rules(solver_type, True, lower_order_final, euler_at_final)
    return solve_multistep("x0", denoise, schedule, times, x, trajectory, 2, rules, any_steps=True)


def dpmpp_3m(
    denoise: Denoise,
    schedule: Schedule,
    times: Any,
    x: Start,
    *,
    key: Array | None = None,
    noise: Noise | None = None,
    trajectory: bool = False,
    solver_type: str = "midpoint",
    corrected: bool = False,
    lower_order_final: bool = False,
    euler_at_final: bool = False,
) -> Result:
    """DPM-Solver++(3M): the parabola through this and the two previous x0.

    As published, in Lu et al.'s code, the second difference, h^2 x0''/2, is multiplied by what
    belongs to h^2 x0'', which leaves order 2. `corrected` doubles it, and since a first step of
    order 1 would leave order 2 as well, corrects its result as UniPC does, at no evaluation:
    order 3. From alpha_t = 0 the step after that is corrected, and second order in the number of
    steps is what is left: see `exponential`. One evaluation a step; deterministic, key and noise
    unused.

    Start-up rule: as in `dpmpp_2m`, a step is of order 1 or 2 while fewer steps of finite h
    precede it; those of order 2 are of `solver_type`. `lower_order_final` lowers the last step to
    order 1 and the one before to 2 at most (many libraries do so below 15 steps);
    `euler_at_final` the last step alone.

    Raises ConfigError for an unknown solver_type or bad times.
    """
    del key, noise
    rules = Rules(solver_type, corrected, lower_order_final, euler_at_final, corrected)
    return solve_multistep("x0", denoise, schedule, times, x, trajectory, 3, rules, any_steps=True)


def dpmpp_1s(
    denoise: Denoise,
    schedule: Schedule,
    times: Any,
    x: Start,
    *,
    key: Array | None = None,
    noise: Noise | None = None,
    trajectory: bool = False,
) -> Result:
    """DPM-Solver++(1S): of order 1, and therefore `dpmpp_1m`.

    Raises ConfigError for bad times.
    """
    del key, noise
    return solve_singlestep("x0", denoise, schedule, times, x, trajectory, 1, Rules(), None)


def dpmpp_2s(
    denoise: Denoise,
    schedule: Schedule,
    times: Any,
    x: Start,
    *,
    key: Array | None = None,
    noise: Noise | None = None,
    trajectory: bool = False,
    solver_type: str = "midpoint",
    lower_order_final: bool = False,
    order_list: Sequence[int] | None = None,
) -> Result:
    """DPM-Solver++(2S): steps over two intervals of `times`, the inner time being one of `times`.

    Lu et al. 2022, "DPM-Solver++", algorithm 1, with r = (rise of the first interval)/h. So len(
    times) - 1 evaluations, as with every solver here. Second order; the rest as in `dpmpp_3s`.

    Raises ConfigError for an unknown solver_type, a bad order_list or bad times.
    """
    del key, noise
    rules = Rules(solver_type, True, lower_order_final)
    return solve_singlestep(
        "x0", denoise, schedule, times, x, trajectory, 2, rules, order_list, any_steps=True
    )


def dpmpp_3s(
    denoise: Denoise,
    schedule: Schedule,
    times: Any,
    x: Start,
    *,
    key: Array | None = None,
    noise: Noise | None = None,
    trajectory: bool = False,
    solver_type: str = "midpoint",
    lower_order_final: bool = False,
    order_list: Sequence[int] | None = None,
) -> Result:
    """DPM-Solver++(3S): steps over three intervals of `times`, both inner times being of `times`.

    Lu et al. 2022, "DPM-Solver", algorithm 2, for x0. The states at the inner times are solutions
    of order 1 and 2 from the start of the group. Groups cover three intervals of `times` each, with
    at the end one of two or two of two for what is left over. `lower_order_final` is the published
    rule: one interval left over is a group, and where nothing is left over the last group is
    divided into two and one (for 2S one and one). A step to sigma_s = 0 is always of order 1.
    `order_list` [steps] gives the order of every interval, up to that of the method, instead, such
    as (1, 2, 3, 1, 2, 1); `lower_order_final` is refused beside it.

    Order 3 needs the second inner time at about 2h/3, as on grids that are smooth in logsnr or t:
    there the value at the first, whose state is of order 1, has no weight ("midpoint" leaves it out
    anywhere); elsewhere both solver types are of order 2. The group from alpha_t = 0 begins anew
    after one step. Deterministic, key and noise unused.

    Raises ConfigError for an unknown solver_type, a bad order_list or bad times.
    """
    del key, noise
    rules = Rules(solver_type, True, lower_order_final)
    return solve_singlestep(
        "x0", denoise, schedule, times, x, trajectory, 3, rules, order_list, any_steps=True
    )
