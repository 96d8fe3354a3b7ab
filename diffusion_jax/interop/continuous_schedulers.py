"""Schedulers without a beta table: EDM's noise levels, and flow matching."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_jax.diffusion.schedules import edm, rectified_flow
from diffusion_jax.interop.discrete_schedulers import restriction
from diffusion_jax.interop.level_grids import (
    falling,
    flow_levels,
    shift_levels,
    times_at,
    ve_levels,
)
from diffusion_jax.interop.level_schedulers import churn
from diffusion_jax.interop.multistep_rules import multistep_solver
from diffusion_jax.interop.scheduler_config import SchedulerConfig
from diffusion_jax.interop.scheduler_plan import SchedulerPlan
from diffusion_jax.interop.scheduler_tables import exponential, karras, respaced
from diffusion_jax.interop.timestep_lists import given_falling

Arguments = Mapping[str, Any]


def edm_euler(config: SchedulerConfig, steps: int | None, arguments: Arguments) -> SchedulerPlan:
    """EDM's Euler method, with churn as diffusers adds it: after the network's evaluation."""
    levels = _edm_levels(config, steps)
    begin = config.begin(arguments, len(levels) - 1)
    held = {"held": "edm", "sigma_data": config.number("sigma_data", above=0.0)}
    options, draws = churn(config, levels[begin:], len(levels) - 1, arguments, **held)
    return _edm_plan(config, levels, arguments, solver="euler", options=options, draws=draws)


def edm_multistep(
    config: SchedulerConfig, steps: int | None, arguments: Arguments
) -> SchedulerPlan:
    """DPM-Solver++ over EDM's levels."""
    levels = _edm_levels(config, steps)
    counted = len(levels) - 1
    left = counted - config.begin(arguments, counted)
    solver, options, noisy = multistep_solver(config, counted, left)
    draws = (int(noisy),) * left
    return _edm_plan(config, levels, arguments, solver=solver, options=options, draws=draws)


def _edm_levels(config: SchedulerConfig, steps: int | None) -> np.ndarray:
    if steps is None or steps < 1:
        raise config.refuse_argument("steps", steps, "a number of steps")
    low = config.number("sigma_min", above=0.0)
    high, rho = config.number("sigma_max", above=low), config.number("rho", above=0.0)
    if config.choose("sigma_schedule", ("karras", "exponential")) == "karras":
        levels = karras(low, high, steps, rho)
    else:
        levels = exponential(low, high, steps)
    final = {"zero": 0.0, "sigma_min": low}
    last = final[config.choose("final_sigmas_type", final)]
    return np.append(levels, last).astype(np.float32).astype(np.float64)


def _edm_plan(
    config: SchedulerConfig, levels: np.ndarray, arguments: Arguments, **fields: Any
) -> SchedulerPlan:
    begin = config.begin(arguments, len(levels) - 1)
    schedule = edm(*(config.number(field) for field in ("sigma_min", "sigma_max", "rho")))
    timesteps = 0.25 * np.log(levels[:-1])
    alphas, sigmas = ve_levels(levels[:-1])
    flipped = config.choose("prediction_type", ("epsilon", "v_prediction")) == "v_prediction"
    return SchedulerPlan(
        scheduler=config.class_name,
        schedule=schedule,
        times=times_at(config, schedule, *ve_levels(falling(config, levels[begin:]))),
        timesteps=timesteps[begin:],
        alphas=alphas[begin:],
        sigmas=sigmas[begin:],
        prediction="edm",
        flipped=flipped,
        sigma_data=config.number("sigma_data", above=0.0),
        initial_scale=(config.number("sigma_max") ** 2 + 1.0) ** 0.5,
        noised=(timesteps, alphas, sigmas),
        integer_timesteps=False,
        **restriction(config),
        **fields,
    )


def flow_euler(config: SchedulerConfig, steps: int | None, arguments: Arguments) -> SchedulerPlan:
    """Euler's method for rectified flow, or with new noise after every step; the class takes the
    arguments of churn and makes nothing of them."""
    size, given = config.size, _given_timesteps(config, arguments)
    levels = _flow_levels(config, steps, arguments).astype(np.float32).astype(np.float64)
    timesteps = levels * size if given is None else given
    stochastic = bool(config["stochastic_sampling"])
    begin = config.begin(arguments, len(levels))
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
    timesteps = evaluated * config.size
    begin = config.begin(arguments, len(levels), evaluations=2)
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
    given = _given_timesteps(config, arguments)
    if "sigmas" in arguments:
        levels = given_falling(config, "sigmas", arguments["sigmas"], 0.0, 1.0, above=True)
        levels = levels.astype(np.float32).astype(np.float64)
    elif given is not None:
        levels = given.astype(np.float32).astype(np.float64) / config.size
    elif steps is None:
        raise config.refuse_argument("steps", steps, "a number of steps")
    else:
        # The ends of the training levels, which were shifted once before.
        low = np.float64(1.0 / config.size)
        if not config.get("use_dynamic_shifting"):
            low = shift_levels(low, config.number("shift", above=0.0))
        levels = np.linspace(np.float32(1.0), np.float32(low), steps)
    levels = shifted_levels(config, levels, arguments, "shift")
    if "use_karras_sigmas" in config:
        elsewhere = respaced(config, levels, len(levels))
        levels = levels if elsewhere is None else elsewhere
    return levels


def _given_timesteps(config: SchedulerConfig, arguments: Arguments) -> np.ndarray | None:
    if "timesteps" not in arguments:
        return None
    return given_falling(config, "timesteps", arguments["timesteps"], 0, config.size, above=True)


def shifted_levels(
    config: SchedulerConfig, levels: np.ndarray, arguments: Arguments, field: str
) -> np.ndarray:
    """Levels of a flow moved towards noise by `field` or, which depends on the resolution, `mu`.

    With `shift_terminal` they are then stretched, 1 staying where it is, so that it is the last.
    """
    if config.get("use_dynamic_shifting"):
        shift = _dynamic_shift(config, arguments)
        # The same to rounding, which diffusers' two forms do differently.
        levels = shift / (shift + (1.0 / levels - 1.0))
    else:
        levels = shift_levels(levels, config.number(field, above=0.0))
    if not config.get("shift_terminal"):
        return levels
    terminal = config.number("shift_terminal", above=0.0, below=1.0)
    if levels[-1] >= 1.0:
        expected = "None where the last level is 1, as with one step"
        raise config.refuse_argument("shift_terminal", terminal, expected)
    kept = 1.0 - levels
    return 1.0 - kept * (1.0 - terminal) / kept[-1]


def _dynamic_shift(config: SchedulerConfig, arguments: Arguments) -> float:
    """The shift that `mu` means."""
    if "mu" not in arguments:
        raise config.refuse_argument("mu", None, "a number, with use_dynamic_shifting=True")
    if config.choose("time_shift_type", ("exponential", "linear")) == "linear":
        return config.argument(arguments, "mu", 0.0, above=0.0)
    # Beyond this the exponential, or 1 over it, is no finite number.
    return float(np.exp(config.argument(arguments, "mu", 0.0, least=-700.0, most=700.0)))


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
        times=falling(config, levels[begin:]),
        timesteps=timesteps[seen:],
        alphas=alphas[seen:],
        sigmas=sigmas[seen:],
        prediction="velocity",
        initial_scale=1.0,
        integer_timesteps=False,
        **fields,
    )
