"""Schedulers without a beta table: EDM's noise levels, and flow matching."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_jax.diffusion.schedules import edm, rectified_flow
from diffusion_jax.interop.discrete_schedulers import restriction
from diffusion_jax.interop.level_grids import falling, flow_levels, times_at, ve_levels
from diffusion_jax.interop.level_schedulers import churn, first_step
from diffusion_jax.interop.multistep_rules import multistep_solver
from diffusion_jax.interop.scheduler_config import SchedulerConfig
from diffusion_jax.interop.scheduler_plan import SchedulerPlan
from diffusion_jax.interop.scheduler_tables import exponential, karras, respaced

Arguments = Mapping[str, Any]


def edm_euler(config: SchedulerConfig, steps: int | None, arguments: Arguments) -> SchedulerPlan:
    """EDM's Euler method, with churn as diffusers adds it: after the network's evaluation."""
    levels = _edm_levels(config, steps)
    begin = int(arguments.get("begin_index", 0))
    held = {"held": "edm", "sigma_data": float(config["sigma_data"])}
    options, draws = churn(levels[begin:], len(levels) - 1, arguments, **held)
    return _edm_plan(config, levels, arguments, solver="euler", options=options, draws=draws)


def edm_multistep(
    config: SchedulerConfig, steps: int | None, arguments: Arguments
) -> SchedulerPlan:
    """DPM-Solver++ over EDM's levels."""
    levels = _edm_levels(config, steps)
    begin = int(arguments.get("begin_index", 0))
    solver, options, noisy = multistep_solver(config, len(levels) - 1, len(levels) - 1 - begin)
    draws = (int(noisy),) * (len(levels) - 1 - begin)
    return _edm_plan(config, levels, arguments, solver=solver, options=options, draws=draws)


def _edm_levels(config: SchedulerConfig, steps: int | None) -> np.ndarray:
    if steps is None or steps < 1:
        raise config.refuse_argument("steps", steps, "a number of steps")
    low, high = float(config["sigma_min"]), float(config["sigma_max"])
    if config.choose("sigma_schedule", ("karras", "exponential")) == "karras":
        levels = karras(low, high, steps, float(config["rho"]))
    else:
        levels = exponential(low, high, steps)
    final = {"zero": 0.0, "sigma_min": low}
    last = final[config.choose("final_sigmas_type", final)]
    return np.append(levels, last).astype(np.float32).astype(np.float64)


def _edm_plan(
    config: SchedulerConfig, levels: np.ndarray, arguments: Arguments, **fields: Any
) -> SchedulerPlan:
    begin = int(arguments.get("begin_index", 0))
    schedule = edm(config["sigma_min"], config["sigma_max"], config["rho"])
    timesteps = 0.25 * np.log(levels[:-1])
    alphas, sigmas = ve_levels(levels[:-1])
    flipped = config.choose("prediction_type", ("epsilon", "v_prediction")) == "v_prediction"
    return SchedulerPlan(
        scheduler=config.class_name,
        schedule=schedule,
        times=times_at(schedule, *ve_levels(falling(levels[begin:]))),
        timesteps=timesteps[begin:],
        alphas=alphas[begin:],
        sigmas=sigmas[begin:],
        prediction="edm",
        flipped=flipped,
        sigma_data=float(config["sigma_data"]),
        initial_scale=float((config["sigma_max"] ** 2 + 1.0) ** 0.5),
        noised=(timesteps, alphas, sigmas),
        integer_timesteps=False,
        **restriction(config),
        **fields,
    )


def flow_euler(config: SchedulerConfig, steps: int | None, arguments: Arguments) -> SchedulerPlan:
    """Euler's method for rectified flow, or with new noise after every step; the class takes the
    arguments of churn and makes nothing of them."""
    size = int(config["num_train_timesteps"])
    levels, given = _flow_levels(config, steps, arguments), arguments.get("timesteps")
    levels = levels.astype(np.float32).astype(np.float64)
    timesteps = levels * size if given is None else np.asarray(given, np.float64)
    stochastic = bool(config["stochastic_sampling"])
    begin = int(arguments.get("begin_index", 0))
    inverted: dict[str, Any] = {}
    if config["invert_sigmas"]:
        if stochastic:
            raise config.refuse("stochastic_sampling", ["False with invert_sigmas"])
        # The network is told the share of data and gives the way to them, x0 - eps.
        timesteps = (1.0 - levels) * size
        inverted = {"flipped": True, "noised": (timesteps, levels, 1.0 - levels)}
    return _flow_plan(
        config,
        np.append(levels, 0.0),
        timesteps,
        levels,
        begin,
        solver="flow_euler",
        options={"renewal": float(stochastic)},
        draws=(int(stochastic),) * (len(levels) - begin),
        **inverted,
    )


def flow_heun(config: SchedulerConfig, steps: int | None, arguments: Arguments) -> SchedulerPlan:
    """Heun's method for rectified flow: the network sees every level but the first twice."""
    if arguments.get("s_churn"):
        # The class adds noise and leaves the share of data as it was: off the levels of the flow.
        raise config.refuse_argument("s_churn", arguments["s_churn"], "0")
    levels = _flow_levels(config, steps, arguments).astype(np.float32).astype(np.float64)
    evaluated = np.append(levels[:1], np.repeat(levels[1:], 2))
    timesteps = evaluated * int(config["num_train_timesteps"])
    begin = first_step(config, arguments)
    return _flow_plan(
        config,
        np.append(levels, 0.0),
        timesteps,
        evaluated,
        begin,
        solver="heun",
        options={"coordinates": "flow"},
        draws=(0,) * (len(levels) - begin),
    )


def _flow_levels(config: SchedulerConfig, steps: int | None, arguments: Arguments) -> np.ndarray:
    """Levels from the noisiest to the last before 0, shifted as the config and `mu` say."""
    size = int(config["num_train_timesteps"])
    dynamic = bool(config.get("use_dynamic_shifting"))
    if arguments.get("sigmas") is not None:
        levels = np.asarray(arguments["sigmas"], np.float32).astype(np.float64)
    elif arguments.get("timesteps") is not None:
        levels = np.asarray(arguments["timesteps"], np.float32).astype(np.float64) / size
    elif steps is None or steps < 1:
        raise config.refuse_argument("steps", steps, "a number of steps")
    else:
        # The ends of the training levels, which were shifted once before.
        shift = 1.0 if dynamic else float(config["shift"])
        low = shift / size / (1.0 + (shift - 1.0) / size)
        levels = np.linspace(np.float32(1.0), np.float32(low), steps)
    if dynamic:
        levels = shifted(config, levels, arguments)
    else:
        shift = float(config["shift"])
        levels = shift * levels / (1.0 + (shift - 1.0) * levels)
    if config.get("shift_terminal"):
        levels = to_terminal(levels, float(config["shift_terminal"]))
    if "use_karras_sigmas" in config:
        elsewhere = respaced(config, levels, len(levels))
        levels = levels if elsewhere is None else elsewhere
    return levels


def shifted(config: SchedulerConfig, levels: np.ndarray, arguments: Arguments) -> np.ndarray:
    """Levels moved towards noise by `mu`, which depends on the resolution."""
    mu = arguments.get("mu")
    if mu is None:
        raise config.refuse_argument("mu", None, "a number, with use_dynamic_shifting=True")
    kind = config.choose("time_shift_type", ("exponential", "linear"))
    shift = float(np.exp(mu)) if kind == "exponential" else float(mu)
    return shift / (shift + (1.0 / levels - 1.0))


def to_terminal(levels: np.ndarray, terminal: float) -> np.ndarray:
    """Levels stretched, 1 staying where it is, so that the last is `terminal`."""
    kept = 1.0 - levels
    return 1.0 - kept * (1.0 - terminal) / kept[-1]


def _flow_plan(
    config: SchedulerConfig,
    levels: np.ndarray,
    timesteps: np.ndarray,
    evaluated: np.ndarray,
    begin: int,
    **fields: Any,
) -> SchedulerPlan:
    schedule = rectified_flow()
    alphas, sigmas = flow_levels(evaluated)
    timesteps = np.asarray(timesteps, np.float32).astype(np.float64)
    seen = begin if len(evaluated) < len(levels) else 2 * begin
    fields = {"noised": (timesteps, alphas, sigmas), **fields}
    return SchedulerPlan(
        scheduler=config.class_name,
        schedule=schedule,
        times=falling(levels[begin:]),
        timesteps=timesteps[seen:],
        alphas=alphas[seen:],
        sigmas=sigmas[seen:],
        prediction="velocity",
        initial_scale=1.0,
        integer_timesteps=False,
        **fields,
    )
