"""DPM-Solver (Lu et al. 2022) and DEIS (Zhang and Chen 2023): exponential integrators for eps.

All integrate equation (3) of `exponential`, polynomials in log(alpha/sigma) through values of
eps = (x - alpha x0)/sigma, so that an x0 that was clipped or guided counts; one evaluation a step.
A step from alpha_t = 0 is x_s = alpha_s x0 + sigma_s eps, one to sigma_s = 0 ends at x0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Array

from diffusion_jax.diffusion.broadcasting import Count
from diffusion_jax.diffusion.schedule_base import Schedule
from diffusion_jax.diffusion.solvers.exponential_plans import Rules
from diffusion_jax.diffusion.solvers.exponential_run import solve_multistep, solve_singlestep
from diffusion_jax.diffusion.solvers.stepping import Denoise, Noise, Result, Start


def dpmsolver(
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
    corrected: bool = False,
    lower_order_final: bool = False,
    euler_at_final: bool = False,
) -> Result:
    """DPM-Solver as a multistep method of order 1, 2 (if None) or 3:

    x_s = (alpha_s/alpha_t) x_t - sigma_s (e^h - 1) D,  D = eps + h/(2 h_previous) (eps - previous)

    for order 2, or with `solver_type="heun"` the exact integral of that line. Order 3 is order 2 as
    published, in Lu et al.'s code, for the reason given at `dpmpp_3m`; `corrected` makes it 3. One
    evaluation a step; deterministic, key and noise unused. Start-up rule, `lower_order_final` and
    `euler_at_final` as in `dpmpp_3m`.

    Raises ConfigError for another order or more than there are steps, an unknown solver_type or bad
    times.
    """
    del key, noise
    rules = Rules(solver_type, corrected, lower_order_final, euler_at_final, corrected)
    return solve_multistep("eps", denoise, schedule, times, x, trajectory, order, rules)


def dpmsolver_singlestep(
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
    order_list: Sequence[int] | None = None,
) -> Result:
    """DPM-Solver-1, -2 (if None) and -3 (Lu et al. 2022, "DPM-Solver", algorithms 1 and 2).

    Steps over `order` intervals of `times`, whose inner ones are the inner times of the algorithms;
    one evaluation an interval. Groups, options and orders as in `dpmpp_3s`. Deterministic, key and
    noise unused.

    Raises ConfigError for another order or more than there are steps, an unknown solver_type, a bad
    order_list or bad times.
    """
    del key, noise
    rules = Rules(solver_type, True, lower_order_final)
    return solve_singlestep(
        "eps", denoise, schedule, times, x, trajectory, order, rules, order_list
    )


def deis(
    denoise: Denoise,
    schedule: Schedule,
    times: Any,
    x: Start,
    *,
    key: Array | None = None,
    noise: Noise | None = None,
    trajectory: bool = False,
    order: Count | None = None,
    corrected: bool = False,
    lower_order_final: bool = False,
) -> Result:
    """DEIS in log rho, rho = sigma/alpha, multistep of order 1, 2 (if None) or 3.

    Zhang and Chen 2023, "Fast Sampling of Diffusion Models with Exponential Integrator", equations
    14 and 15, with polynomials in log rho: x_s = alpha_s (x_t/alpha_t + the integral of the
    polynomial through this and the previous eps over rho from rho_t to rho_s). Since log rho is
    -log(alpha/sigma), order 2 is the "heun" of `dpmsolver` and order 3 has the weights of its
    `corrected`, but not its first step: that of order 1 leaves order 2 unless it starts at so much
    noise that eps hardly changes over it. `corrected` corrects the first step of order 3 as
    `dpmpp_3m` does, at no evaluation. One evaluation a step; deterministic, key and noise unused.
    Start-up rule and `lower_order_final` as in `dpmpp_3m`.

    Raises ConfigError for another order or more than there are steps, or bad times.
    """
    del key, noise
    rules = Rules("heun", True, lower_order_final, False, corrected)
    return solve_multistep("eps", denoise, schedule, times, x, trajectory, order, rules)
