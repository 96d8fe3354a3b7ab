"""Schedulers of DPM-Solver's family: multistep, single-step, DEIS, UniPC.

They keep alpha x0 + sigma eps and step between noise levels. Timesteps are whole, also where the
levels lie between those of the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_jax.diffusion.schedules import rectified_flow
from diffusion_jax.interop.continuous_schedulers import shifted_levels
from diffusion_jax.interop.discrete_schedulers import restriction
from diffusion_jax.interop.level_grids import falling, flow_levels, times_at, vp_levels
from diffusion_jax.interop.multistep_rules import (
    algorithm_of,
    ends_low,
    multistep_solver,
    order_list,
    order_of,
    type_of,
)
from diffusion_jax.interop.scheduler_config import SchedulerConfig
from diffusion_jax.interop.scheduler_plan import SchedulerPlan
from diffusion_jax.interop.scheduler_tables import (
    almost_zero,
    alphabars,
    as_table,
    exponential,
    level_of,
    respaced,
    timestep_of,
)
from diffusion_jax.interop.timestep_lists import given_falling, spaced

_PREDICTIONS = {
    "epsilon": "eps",
    "sample": "x0",
    "v_prediction": "v",
    "flow_prediction": "velocity",
}

Arguments = Mapping[str, Any]


def multistep(config: SchedulerConfig, steps: int | None, arguments: Arguments) -> SchedulerPlan:
    """DPM-Solver, DPM-Solver++ and their SDE forms as multistep methods."""
    products = almost_zero(alphabars(config), config)
    levels, timesteps = _grid(config, steps, arguments, products)
    begin = config.begin(arguments, len(timesteps))
    counted = len(timesteps)
    solver, options, noisy = multistep_solver(config, counted, counted - begin)
    _check_final(config, algorithm_of(config))
    draws = (int(noisy),) * (counted - begin)
    return _plan(
        config, products, levels, timesteps, begin, solver=solver, options=options, draws=draws
    )


def singlestep(config: SchedulerConfig, steps: int | None, arguments: Arguments) -> SchedulerPlan:
    """DPM-Solver and DPM-Solver++ as single-step methods, whose inner levels are of the grid."""
    products = alphabars(config)
    levels, timesteps = _grid(config, steps, arguments, products)
    algorithm = algorithm_of(config)
    _check_final(config, algorithm)
    begin = config.begin(arguments, len(timesteps))
    # Those that begin within a group have no values before them.
    orders = [
        min(order, k + 1) for k, order in enumerate(order_list(config, len(timesteps))[begin:])
    ]
    most = int(config["solver_order"])
    options: dict[str, Any] = {}
    if most > 1:
        options = {"solver_type": type_of(config), "order_list": orders}
    solver = f"dpmpp_{most}s"
    if algorithm == "dpmsolver":
        solver, options = "dpmsolver_singlestep", {**options, "order": most}
    elif algorithm == "sde-dpmsolver++":
        solver, options = "dpmpp_sde_singlestep", {**options, "order": most, "corrected": False}
    draws = (int(algorithm == "sde-dpmsolver++"),) * (len(timesteps) - begin)
    return _plan(
        config, products, levels, timesteps, begin, solver=solver, options=options, draws=draws
    )


def deis(config: SchedulerConfig, steps: int | None, arguments: Arguments) -> SchedulerPlan:
    """DEIS in log rho; it ends at the lowest level, not at 0."""
    products = alphabars(config)
    levels, timesteps = _grid(config, steps, arguments, products)
    begin = config.begin(arguments, len(timesteps))
    counted = len(timesteps)
    config.choose("algorithm_type", ("deis", "dpmsolver", "dpmsolver++"))
    config.choose("solver_type", ("logrho", "midpoint", "heun", "bh1", "bh2"))
    options = {
        "order": order_of(config, counted - begin),
        "lower_order_final": ends_low(config, counted),
    }
    draws = (0,) * (counted - begin)
    return _plan(
        config, products, levels, timesteps, begin, solver="deis", options=options, draws=draws
    )


def unipc(config: SchedulerConfig, steps: int | None, arguments: Arguments) -> SchedulerPlan:
    """UniPC."""
    if config["solver_p"] is not None:
        raise config.refuse("solver_p", [None])
    products = almost_zero(alphabars(config), config)
    levels, timesteps = _grid(config, steps, arguments, products)
    begin = config.begin(arguments, len(timesteps))
    others = {"midpoint": "bh2", "heun": "bh2", "logrho": "bh2"}
    kind = config.choose("solver_type", ("bh1", "bh2", *others))
    predict_x0 = bool(config["predict_x0"])
    counted = len(timesteps)
    disabled = config["disable_corrector"]
    if not isinstance(disabled, (list, tuple)):
        raise config.refuse_argument("disable_corrector", disabled, "a list of steps")
    uncorrected = [int(config.checked("disable_corrector", k, whole=True)) for k in disabled]
    options = {
        "order": order_of(config, counted - begin),
        "solver_type": others.get(kind, kind),
        "predict_x0": predict_x0,
        "lower_order_final": bool(config["lower_order_final"]),
        # Numbers of steps that a shorter run does not have say nothing about it.
        "disable_corrector": tuple(k - begin for k in uncorrected if begin <= k < counted),
    }
    draws = (0,) * (counted - begin)
    return _plan(
        config, products, levels, timesteps, begin, solver="unipc", options=options, draws=draws
    )


def _check_final(config: SchedulerConfig, algorithm: str) -> None:
    """eps of the last step is needed at its end, where sigma is not to be 0."""
    if not algorithm.endswith("++") and config["final_sigmas_type"] == "zero":
        raise config.refuse("final_sigmas_type", ["sigma_min with this algorithm_type"])


def _spaced(
    config: SchedulerConfig, steps: int | None, arguments: Arguments, products: np.ndarray
) -> np.ndarray:
    """Whole timesteps, falling; an interval more is spaced than there are steps."""
    size = config.size
    if "timesteps" in arguments:
        given = arguments["timesteps"]
        return given_falling(config, "timesteps", given, 0, size - 1, whole=True)
    rising = 0.5 * np.log(products[::-1] / (np.float32(1.0) - products[::-1]))
    most = size - int(np.searchsorted(rising, _lowest(config)))
    if most < 2:
        raise config.refuse_argument("lambda_min_clipped", _lowest(config), f"below {rising[-2]:g}")
    if "timestep_spacing" not in config:
        return spaced(config, steps, kind="linspace", size=most, extra=1)
    return spaced(config, steps, size=most, extra=1)


def _lowest(config: SchedulerConfig) -> float:
    """`lambda_min_clipped`; files hold its default, minus infinity, as a string or as a number."""
    value = config.get("lambda_min_clipped", "-inf")
    return -np.inf if value in ("-inf", -np.inf) else config.number("lambda_min_clipped")


def _grid(
    config: SchedulerConfig, steps: int | None, arguments: Arguments, products: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Levels, with the last, and timesteps, whole."""
    table = level_of(products)
    for name, given in (("sigmas", arguments), ("shift_terminal", config)):
        if given.get(name) is not None and not config["use_flow_sigmas"]:
            raise config.refuse_argument(name, given[name], "None without use_flow_sigmas")
    rounded = config["beta_schedule"] != "squaredcos_cap_v2" or config.class_name in (
        "DPMSolverSinglestepScheduler",
        "DEISMultistepScheduler",
        "UniPCMultistepScheduler",
    )
    if config["use_flow_sigmas"]:
        for other in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"):
            if config[other]:
                raise config.refuse(other, ["False beside use_flow_sigmas"])
        levels = _flow_levels(config, steps, arguments)
        timesteps = levels * config.size
        lowest = levels[-1] if config.class_name == "UniPCMultistepScheduler" else table[0]
    else:
        timesteps = _spaced(config, steps, arguments, products)
        steps, lowest = len(timesteps), table[0]
        levels = np.interp(timesteps, np.arange(len(table)), table)
        elsewhere = _respaced(config, table, steps)
        if elsewhere is not None:
            levels, timesteps = elsewhere, timestep_of(elsewhere, np.log(table))
            lowest = levels[-1] if config.get("sigma_min") is not None else lowest
            if rounded and (config["use_karras_sigmas"] or config.get("use_lu_lambdas")):
                timesteps = timesteps.round()
    if config.class_name == "DEISMultistepScheduler":
        last = levels[-1] if config["use_flow_sigmas"] else lowest
    else:
        final = {"zero": 0.0, "sigma_min": lowest}
        last = final[config.choose("final_sigmas_type", final)]
    return np.append(levels, last).astype(np.float32), np.trunc(timesteps)


def _respaced(config: SchedulerConfig, table: np.ndarray, steps: int) -> np.ndarray | None:
    if config.get("use_lu_lambdas") and not config["use_karras_sigmas"]:
        return exponential(table[0], table[-1], steps)
    return respaced(config, table[::-1], steps)


def _flow_levels(config: SchedulerConfig, steps: int | None, arguments: Arguments) -> np.ndarray:
    """Levels of a rectified flow, the noisiest a little below 1."""
    unipc = config.class_name == "UniPCMultistepScheduler"
    if "sigmas" in arguments:
        levels = given_falling(config, "sigmas", arguments["sigmas"], 0.0, 1.0, above=True)
    elif steps is None:
        raise config.refuse_argument("steps", steps, "a number of steps")
    elif unipc:
        levels = np.linspace(1.0, 1.0 / config.size, steps + 1)[:-1]
    else:
        levels = (1.0 - np.linspace(1.0, 1.0 / config.size, steps + 1))[:0:-1]
    levels = shifted_levels(config, levels, arguments, "flow_shift")
    if unipc and abs(levels[0] - 1.0) < 1e-6:
        levels[0] -= 1e-6
    return levels


def _plan(
    config: SchedulerConfig,
    products: np.ndarray,
    levels: np.ndarray,
    timesteps: np.ndarray,
    begin: int,
    **fields: Any,
) -> SchedulerPlan:
    flow = bool(config["use_flow_sigmas"])
    schedule = rectified_flow() if flow else as_table(products)
    alphas, sigmas = (flow_levels if flow else vp_levels)(levels[:-1])
    kept = falling(config, levels[begin:])
    choices = dict(_PREDICTIONS)
    if not flow:
        # x - sigma times the output is the data for alpha = 1 - sigma alone.
        del choices["flow_prediction"]
    return SchedulerPlan(
        scheduler=config.class_name,
        schedule=schedule,
        times=kept if flow else times_at(config, schedule, *vp_levels(kept)),
        timesteps=timesteps[begin:],
        alphas=alphas[begin:],
        sigmas=sigmas[begin:],
        prediction=choices[config.choose("prediction_type", choices)],
        initial_scale=1.0,
        noised=(timesteps, alphas, sigmas),
        learned_variance=config.get("variance_type") in ("learned", "learned_range"),
        # UniPC restricts x0 where x0 is what it integrates.
        **(restriction(config) if config.get("predict_x0", True) else {}),
        **fields,
    )
