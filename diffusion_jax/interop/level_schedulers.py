"""Schedulers of k-diffusion that step between noise levels: Euler, Heun, DPM2, LMS.

They keep x0 + (sigma / alpha) eps and hand the network alpha times that, our state. Levels and
timesteps are two arrays: levels between those of the table have fractional timesteps, and some
classes round these.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_jax.interop.discrete_schedulers import restriction
from diffusion_jax.interop.level_grids import falling, times_at, vp_levels
from diffusion_jax.interop.scheduler_config import SchedulerConfig, number_of
from diffusion_jax.interop.scheduler_plan import SchedulerPlan
from diffusion_jax.interop.scheduler_tables import (
    almost_zero,
    alphabars,
    as_table,
    level_of,
    respaced,
    timestep_of,
)
from diffusion_jax.interop.timestep_lists import given_falling, spaced

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v"}
_WITH_SAMPLE = {**PREDICTIONS, "sample": "x0", "original_sample": "x0"}

Arguments = Mapping[str, Any]


def euler(config: SchedulerConfig, steps: int | None, arguments: Arguments) -> SchedulerPlan:
    """Euler, with churn as diffusers adds it: after the network has been evaluated."""
    products = almost_zero(alphabars(config), config)
    continuous = config.choose("timestep_type", ("discrete", "continuous")) == "continuous"
    continuous = continuous and config["prediction_type"] == "v_prediction"
    if "sigmas" in arguments:
        levels = _given_levels(config, arguments["sigmas"], level_of(products))
        timesteps = timestep_of(levels[:-1], np.log(level_of(products)))
    else:
        if continuous and "timesteps" in arguments:
            expected = "None with timestep_type='continuous' and v_prediction"
            raise config.refuse_argument("timesteps", arguments["timesteps"], expected)
        levels, timesteps = _euler_grid(config, steps, arguments, products)
    if continuous:
        timesteps = 0.25 * np.log(levels[:-1])
    # The grid of log-linear levels has one more than it has steps, and ends before the last.
    counted = len(levels) - 1
    levels = levels[: len(timesteps) + 1]
    begin = config.begin(arguments, len(timesteps))
    prediction = _WITH_SAMPLE[config.choose("prediction_type", _WITH_SAMPLE)]
    options, draws = churn(config, levels[begin:], counted, arguments, held=prediction)
    return _plan(
        config,
        products,
        levels,
        timesteps,
        begin=begin,
        prediction=prediction,
        solver="euler",
        options=options,
        draws=draws,
    )


def _given_levels(config: SchedulerConfig, sigmas: Any, table: np.ndarray) -> np.ndarray:
    """The caller's levels, with the last, which may be 0; those of the table to rounding."""
    levels = given_falling(config, "sigmas", sigmas, 0.0, float(table[-1]) * (1.0 + 1e-5))
    if len(levels) < 2:
        raise config.refuse_argument("sigmas", sigmas, "the last level too, 0 in most lists")
    return levels.astype(np.float32)


def churn(
    config: SchedulerConfig, levels: np.ndarray, counted: int, arguments: Arguments, **held: Any
) -> tuple[dict[str, Any], tuple[int, ...]]:
    """The options of `euler`, and the draws of diffusers, whose s_churn is over `counted` steps."""
    steps = len(levels) - 1
    s_churn = config.argument(arguments, "s_churn", 0.0, least=0.0) * steps / counted
    low = config.argument(arguments, "s_tmin", 0.0)
    high = number_of(arguments.get("s_tmax", np.inf))
    if not high >= low:
        raise config.refuse_argument("s_tmax", arguments["s_tmax"], f"at least s_tmin={low:g}")
    noise = {"s_noise": config.argument(arguments, "s_noise", 1.0, least=0.0)}
    if s_churn == 0.0:
        return {}, (0,) * steps
    churns = (levels[:-1] >= low) & (levels[:-1] <= high)
    if not churns.any():
        return {}, (0,) * steps
    # Limits that a level meets exactly must not depend on how our schedule rounds it.
    met = levels[:-1][churns].astype(np.float64)
    low, high = min(low, float(met.min()) * (1.0 - 1e-6)), float(met.max()) * (1.0 + 1e-6)
    options = {"s_churn": s_churn, "s_tmin": low, "s_tmax": high, **noise, **held}
    return options, tuple(int(churned) for churned in churns)


def _euler_grid(
    config: SchedulerConfig, steps: int | None, arguments: Arguments, products: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Levels, with the last, and timesteps."""
    table = level_of(products)
    timesteps = _timesteps(config, steps, arguments)
    steps = len(timesteps)
    levels = np.interp(timesteps, np.arange(len(table)), table)
    if config.choose("interpolation_type", ("linear", "log_linear")) == "log_linear":
        high, low = np.log(table[-1]), np.log(table[0])
        levels = np.exp(np.linspace(high, low, steps + 1, dtype=np.float32))
    elsewhere = respaced(config, levels, steps)
    if elsewhere is not None:
        levels, timesteps = elsewhere, timestep_of(elsewhere, np.log(table))
    final = {"zero": 0.0, "sigma_min": table[0]}
    last = final[config.choose("final_sigmas_type", final)]
    return np.append(levels, last).astype(np.float32), timesteps


def euler_ancestral(
    config: SchedulerConfig, steps: int | None, arguments: Arguments
) -> SchedulerPlan:
    """Euler's ancestral method."""
    products = almost_zero(alphabars(config), config)
    levels, timesteps = _grid(config, steps, arguments, products)
    begin = config.begin(arguments, len(timesteps))
    return _plan(
        config,
        products,
        levels,
        timesteps,
        begin=begin,
        solver="euler_ancestral",
        options={},
        draws=(1,) * (len(timesteps) - begin),
    )


def lms(config: SchedulerConfig, steps: int | None, arguments: Arguments) -> SchedulerPlan:
    """The linear multistep method; `order` is 4 unless given."""
    if arguments.get("begin_index"):
        # diffusers then weighs the slopes there are as if there were more.
        raise config.refuse_argument("begin_index", arguments["begin_index"], "0")
    order = int(config.argument(arguments, "order", 4, least=1, most=4, whole=True))
    products = alphabars(config)
    levels, timesteps = _grid(config, steps, arguments, products)
    choices = {**PREDICTIONS, "sample": "x0"}
    return _plan(
        config,
        products,
        levels,
        timesteps,
        prediction=choices[config.choose("prediction_type", choices)],
        solver="lms",
        options={
            # As many as there are, as in the first steps.
            "order": min(order, len(timesteps)),
            "coordinates": "sigma",
        },
        draws=(0,) * len(timesteps),
    )


def heun(config: SchedulerConfig, steps: int | None, arguments: Arguments) -> SchedulerPlan:
    """Heun's method: the network sees every level but the first twice."""
    products = alphabars(config)
    levels, timesteps = _grid(config, steps, arguments, products)
    choices = {**PREDICTIONS, "sample": "x0"}
    begin = config.begin(arguments, len(timesteps), evaluations=2)
    return _plan(
        config,
        products,
        levels,
        np.append(timesteps[:1], np.repeat(timesteps[1:], 2)),
        begin=begin,
        evaluated=np.append(levels[:1], np.repeat(levels[1:-1], 2)),
        prediction=choices[config.choose("prediction_type", choices)],
        solver="heun",
        options={"coordinates": "sigma"},
        draws=(0,) * (len(timesteps) - begin),
    )


def kdpm2(config: SchedulerConfig, steps: int | None, arguments: Arguments) -> SchedulerPlan:
    """DPM-Solver-2 of Karras et al., and its ancestral form: a level within every step."""
    products = alphabars(config)
    levels, timesteps = _grid(config, steps, arguments, products)
    ancestral = config.class_name == "KDPM2AncestralDiscreteScheduler"
    exact = levels.astype(np.float64)
    # The lower level of an ancestral step is u_s^2 / u_t: halfway down to it is u_s itself.
    inner = exact[1:-1] if ancestral else np.sqrt(exact[:-2] * exact[1:-1])
    if config["use_karras_sigmas"]:
        timesteps = timesteps.round()
    between = timestep_of(inner, np.log(level_of(products)))
    pairs = np.stack([between, timesteps[1:]], 1).ravel()
    begin = config.begin(arguments, len(timesteps), evaluations=2)
    return _plan(
        config,
        products,
        levels,
        np.append(timesteps[:1], pairs),
        begin=begin,
        evaluated=np.append(exact[:1], np.stack([inner, exact[1:-1]], 1).ravel()),
        noised_at=np.append(exact[:1], np.repeat(exact[1:-1], 2)),
        solver="kdpm2_ancestral" if ancestral else "kdpm2",
        options={"coordinates": "sigma"},
        draws=(int(ancestral),) * (len(exact) - 2 - begin) + (0,),
    )


def _timesteps(config: SchedulerConfig, steps: int | None, arguments: Arguments) -> np.ndarray:
    """Timesteps in single precision, falling; those of even spacing need not be whole."""
    if "timesteps" in arguments:
        last = config.size - 1
        return given_falling(config, "timesteps", arguments["timesteps"], 0, last).astype(
            np.float32
        )
    return spaced(config, steps, whole=False).astype(np.float32)


def _grid(
    config: SchedulerConfig, steps: int | None, arguments: Arguments, products: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Levels, with 0 at the end, and timesteps."""
    table = level_of(products)
    timesteps = _timesteps(config, steps, arguments)
    levels = np.interp(timesteps, np.arange(len(table)), table)
    elsewhere = respaced(config, levels, len(timesteps)) if "use_karras_sigmas" in config else None
    if elsewhere is not None:
        levels, timesteps = elsewhere, timestep_of(elsewhere, np.log(table))
    return np.append(levels, 0.0).astype(np.float32), timesteps


def _plan(
    config: SchedulerConfig,
    products: np.ndarray,
    levels: np.ndarray,
    timesteps: np.ndarray,
    *,
    begin: int = 0,
    evaluated: np.ndarray | None = None,
    noised_at: np.ndarray | None = None,
    prediction: str | None = None,
    **fields: Any,
) -> SchedulerPlan:
    """The plan over `levels` [N + 1] from step `begin`; evaluated are its first N unless given."""
    schedule = as_table(products)
    seen = begin if evaluated is None else 2 * begin
    alphas, sigmas = vp_levels(levels[:-1] if evaluated is None else evaluated)
    noised = alphas, sigmas
    if noised_at is not None:
        noised = vp_levels(noised_at)
    noised_timesteps = np.asarray(timesteps, np.float64)
    # Pure noise has the level itself as its standard deviation, or that of the state.
    top = float(levels.max())
    even = config["timestep_spacing"] in ("linspace", "trailing")
    scale = top / (1.0 + top**2) ** 0.5 if even else 1.0
    levels = falling(config, levels[begin:])
    if prediction is None:
        prediction = PREDICTIONS[config.choose("prediction_type", PREDICTIONS)]
    return SchedulerPlan(
        scheduler=config.class_name,
        schedule=schedule,
        times=times_at(config, schedule, *vp_levels(levels)),
        timesteps=noised_timesteps[seen:],
        alphas=alphas[seen:],
        sigmas=sigmas[seen:],
        prediction=prediction,
        initial_scale=scale,
        noised=(noised_timesteps, *noised),
        keeps_variance=False,
        integer_timesteps=False,
        **restriction(config),
        **fields,
    )
