"""Which of our multistep and single-step methods a config of DPM-Solver's family means."""

from __future__ import annotations

from typing import Any

from diffusion_jax.interop.scheduler_config import SchedulerConfig

# Only shorter loops end with lower orders.
_FEW_STEPS = 15

# Names of the methods of other classes, which DPM-Solver's classes take for their own default.
_OTHER_TYPES = {"logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint"}
_OTHER_ALGORITHMS = {"deis": "dpmsolver++"}


def order_of(config: SchedulerConfig, steps: int) -> int:
    """`solver_order`, or the number of steps where there are fewer."""
    return min(int(config.choose("solver_order", (1, 2, 3))), steps)


def ends_low(config: SchedulerConfig, counted: int) -> bool:
    """Whether the last two steps of a multistep method are of lower order."""
    return bool(config["lower_order_final"]) and counted < _FEW_STEPS


def multistep_solver(
    config: SchedulerConfig, counted: int, steps: int
) -> tuple[str, dict[str, Any], bool]:
    """Solver, options and whether it draws noise, for `steps` of `counted` steps."""
    options: dict[str, Any] = {
        "lower_order_final": ends_low(config, counted),
        "euler_at_final": bool(config["euler_at_final"]),
    }
    order, algorithm = order_of(config, steps), algorithm_of(config)
    if algorithm != "dpmsolver++" or order > 1:
        options["solver_type"] = type_of(config)
    match algorithm:
        case "dpmsolver++":
            if order == 1:
                options = {}
            return f"dpmpp_{order}m", options, False
        case "dpmsolver":
            return "dpmsolver", {**options, "order": order}, False
        case "sde-dpmsolver++":
            # Order 3 as published has a wrong sign.
            return "dpmpp_sde", {**options, "order": order, "corrected": False}, True
        case _:
            if order == 3:
                raise config.refuse("solver_order", (1, 2))
            return "dpmsolver_sde", {**options, "order": order}, True


def algorithm_of(config: SchedulerConfig) -> str:
    """`algorithm_type`, another class's being replaced as diffusers does."""
    known = ["dpmsolver++", "sde-dpmsolver++"]
    if not config.class_name.startswith("EDM"):
        known += ["dpmsolver", "sde-dpmsolver"]
    if config.class_name == "DPMSolverSinglestepScheduler":
        known = ["dpmsolver++", "dpmsolver", "sde-dpmsolver++"]
    algorithm = _OTHER_ALGORITHMS.get(str(config["algorithm_type"]), config["algorithm_type"])
    return algorithm if algorithm in known else config.choose("algorithm_type", known)


def type_of(config: SchedulerConfig) -> str:
    """`solver_type`, another class's being replaced as diffusers does."""
    kind = _OTHER_TYPES.get(str(config["solver_type"]), config["solver_type"])
    return (
        kind if kind in ("midpoint", "heun") else config.choose("solver_type", ("midpoint", "heun"))
    )


def order_list(config: SchedulerConfig, steps: int) -> tuple[int, ...]:
    """The order of each step of a single-step method."""
    order = int(config.choose("solver_order", (1, 2, 3)))
    zero = config["final_sigmas_type"] == "zero"
    group = tuple(range(1, order + 1))
    lower = config["lower_order_final"] or steps % order != 0 or zero
    whole, left = divmod(steps, order)
    if lower and left == 0 and order > 1:
        ending = (1, 1) if order == 2 else (1, 2, 1)
        orders = group * (whole - 1) + ending
    else:
        orders = group * whole + group[:left]
    return (*orders[:-1], 1) if zero else orders
