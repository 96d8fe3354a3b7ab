"""Schedulers that step between whole timesteps of a beta table: DDPM, DDIM, UnCLIP, PNDM, LCM, TCD.

Timestep i stands at t = (i + 1) / T; where a class goes below timestep 0, at t = 0 or, by
`set_alpha_to_one=False`, at timestep 0 once more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_jax.diffusion.beta_tables import Table
from diffusion_jax.interop.level_grids import falling
from diffusion_jax.interop.scheduler_config import SchedulerConfig
from diffusion_jax.interop.scheduler_plan import SchedulerPlan
from diffusion_jax.interop.scheduler_tables import SPACINGS, alphabars, as_table, betas_of

PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}


def spaced(config: SchedulerConfig, steps: int) -> np.ndarray:
    """Whole timesteps, falling, as DDPM, DDIM and PNDM space them."""
    size = int(config["num_train_timesteps"])
    if not 1 <= steps <= size:
        raise config.refuse_argument("steps", steps, f"a number from 1 to {size}")
    match config.choose("timestep_spacing", SPACINGS):
        case "linspace":
            return np.linspace(0, size - 1, steps).round()[::-1]
        case "leading":
            return np.arange(steps)[::-1] * float(size // steps) + config["steps_offset"]
        case _:
            return np.round(np.arange(size, 0, -size / steps)) - 1.0


def ddpm(config: SchedulerConfig, steps: int | None, arguments: Mapping[str, Any]) -> SchedulerPlan:
    """DDPM: every step goes to the next timestep of the list."""
    timesteps = _own_timesteps(config, steps, arguments)
    after = np.append(timesteps[1:], -1.0)
    return _ancestral(config, timesteps, after, arguments)


def unclip(
    config: SchedulerConfig, steps: int | None, arguments: Mapping[str, Any]
) -> SchedulerPlan:
    """UnCLIP: DDPM between both ends of the table, stepping as the published pipeline does."""
    size = int(config["num_train_timesteps"])
    if steps is None or not 2 <= steps <= size:
        raise config.refuse_argument("steps", steps, f"a number from 2 to {size}")
    timesteps = (np.arange(steps) * ((size - 1) / (steps - 1))).round()[::-1]
    return _ancestral(config, timesteps, np.append(timesteps[1:], -1.0), arguments)


def _ancestral(
    config: SchedulerConfig, timesteps: np.ndarray, after: np.ndarray, arguments: Mapping[str, Any]
) -> SchedulerPlan:
    kinds = {
        "fixed_small": "small",
        "fixed_small_log": "small",
        "fixed_large": "large",
        "learned_range": "learned",
    }
    if config.class_name == "UnCLIPScheduler":
        kinds = {"fixed_small_log": "small", "learned_range": "learned"}
    variance = kinds[config.choose("variance_type", kinds)]
    begin = int(arguments.get("begin_index", 0))
    timesteps, after = timesteps[begin:], after[begin:]
    options: dict[str, Any] = {
        "variance": variance,
        "rounded": _rounded(config, timesteps, after),
    }
    if timesteps[-1] > 0.0:
        options["final_noise"] = True
    return table_plan(
        config,
        timesteps,
        after,
        solver="ddpm",
        options=options,
        draws=tuple(int(step > 0.0) for step in timesteps),
        learned_variance=variance == "learned",
    )


def _rounded(
    config: SchedulerConfig, timesteps: np.ndarray, after: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """alpha_t^2/alpha_s^2 and 1 - it in single precision, which the classes round differently."""
    one, products = np.float32(1.0), alphabars(config)
    entries, ends = timesteps.astype(int), after.astype(int)
    ratio = products[entries] / np.where(ends >= 0, products[ends], one)
    beta = one - ratio
    if config.class_name == "UnCLIPScheduler":
        beta = np.where(ends == entries - 1, betas_of(config)[entries], beta)
        ratio = one - beta
    return ratio, beta


def ddim(config: SchedulerConfig, steps: int | None, arguments: Mapping[str, Any]) -> SchedulerPlan:
    """DDIM: every step goes T // steps timesteps down, wherever the next one is."""
    steps = _required(config, steps)
    timesteps = spaced(config, steps)[int(arguments.get("begin_index", 0)) :]
    after = timesteps - int(config["num_train_timesteps"]) // steps
    eta = float(arguments.get("eta", 0.0))
    clipped = bool(arguments.get("use_clipped_model_output", False))
    return table_plan(
        config,
        timesteps,
        after,
        solver="ddim",
        options={"eta": eta, "eps_from_x0": clipped},
        draws=(int(eta > 0.0),) * len(timesteps),
    )


def lcm(config: SchedulerConfig, steps: int | None, arguments: Mapping[str, Any]) -> SchedulerPlan:
    """Latent consistency sampling; the last step goes to the data."""
    timesteps = _distilled(config, steps, arguments)
    return table_plan(
        config,
        timesteps,
        np.append(timesteps[1:], -np.inf),
        solver="lcm",
        options={"timestep_scaling": float(config["timestep_scaling"])},
        draws=(1,) * (len(timesteps) - 1) + (0,),
    )


def tcd(config: SchedulerConfig, steps: int | None, arguments: Mapping[str, Any]) -> SchedulerPlan:
    """Trajectory consistency sampling; the last step goes to timestep 0."""
    timesteps = _distilled(config, steps, arguments)
    eta = float(arguments.get("eta", 0.3))
    after = np.append(timesteps[1:], 0.0)
    noisy = int(eta > 0.0)
    # Of a shortened list diffusers still counts the steps that it had.
    shortened = arguments.get("timesteps") is not None and arguments.get("strength", 1.0) < 1.0
    return table_plan(
        config,
        timesteps,
        after,
        solver="tcd",
        options={"gamma": eta, "table": True},
        draws=(noisy,) * (len(timesteps) - 1) + (noisy * int(shortened),),
    )


def table_plan(
    config: SchedulerConfig,
    timesteps: np.ndarray,
    after: np.ndarray,
    *,
    options: dict[str, Any],
    evaluated: np.ndarray | None = None,
    **fields: Any,
) -> SchedulerPlan:
    """The plan that steps from `timesteps` to `after`, [steps] each, below 0 meaning the data.

    `evaluated` are the timesteps that the network sees, unless it sees each once.
    """
    products = alphabars(config)
    schedule, size = as_table(products), len(products)
    evaluated = timesteps if evaluated is None else evaluated
    outside = (evaluated < 0) | (evaluated >= size)
    if outside.any():
        raise config.refuse_argument("timestep", int(evaluated[outside][0]), f"0 to {size - 1}")
    choices = {"UnCLIPScheduler": ("epsilon", "sample")}.get(config.class_name, PREDICTIONS)
    below = 0.0 if config.get("set_alpha_to_one", True) or np.isneginf(after[-1]) else 1.0 / size
    last = below if after[-1] < 0.0 else (after[-1] + 1.0) / size
    if not np.array_equal(timesteps[1:], after[:-1]):
        # The state is taken to be at the next timestep, wherever the step has led.
        options = {"stride": int(timesteps[0] - after[0]), **options}
    known = np.arange(float(size))
    alphas, sigmas = _levels(schedule, evaluated)
    return SchedulerPlan(
        scheduler=config.class_name,
        schedule=schedule,
        times=falling(np.append((timesteps + 1.0) / size, last)),
        options=options,
        timesteps=evaluated,
        alphas=alphas,
        sigmas=sigmas,
        prediction=PREDICTIONS[config.choose("prediction_type", choices)],
        initial_scale=1.0,
        noised=(known, *_levels(schedule, known)),
        **restriction(config),
        **fields,
    )


def _levels(schedule: Table, timesteps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    times = (timesteps + 1.0) / schedule.num_steps
    return np.asarray(schedule.alpha(times)), np.asarray(schedule.sigma(times))


def restriction(config: SchedulerConfig) -> dict[str, Any]:
    """The fields of a plan that say how x0 is clipped or thresholded; TCD's class does neither."""
    if config.class_name == "TCDScheduler":
        return {}
    if config.get("thresholding"):
        limits = config["dynamic_thresholding_ratio"], config["sample_max_value"]
        return {"threshold": (float(limits[0]), float(limits[1]))}
    if config.get("clip_sample"):
        return {"clip": float(config["clip_sample_range"])}
    return {}


def _required(config: SchedulerConfig, steps: int | None) -> int:
    if steps is None:
        raise config.refuse_argument("steps", None, "a number of steps")
    return steps


def _own_timesteps(
    config: SchedulerConfig, steps: int | None, arguments: Mapping[str, Any]
) -> np.ndarray:
    """The caller's falling list of timesteps, or else those of the config's spacing."""
    given = arguments.get("timesteps")
    if given is None:
        return spaced(config, _required(config, steps))
    timesteps = np.asarray(given, np.float64)
    if (np.diff(timesteps) >= 0.0).any():
        raise config.refuse_argument("timesteps", list(given), "falling timesteps")
    return timesteps


def _distilled(
    config: SchedulerConfig, steps: int | None, arguments: Mapping[str, Any]
) -> np.ndarray:
    """Timesteps of LCM and TCD: a choice among those that the student was distilled on."""
    begin = int(arguments.get("begin_index", 0))
    size = int(config["num_train_timesteps"])
    strength = float(arguments.get("strength", 1.0))
    if arguments.get("timesteps") is not None:
        timesteps = _own_timesteps(config, steps, arguments)
        kept = min(int(len(timesteps) * strength), len(timesteps))
        return timesteps[len(timesteps) - kept :][begin:]
    given = arguments.get("original_inference_steps")
    count = given or config["original_inference_steps"]
    trained = (np.arange(1, int(count * strength) + 1) * (size // count) - 1.0)[::-1]
    if given is not None and config.class_name == "TCDScheduler":
        # The class then chooses among all timesteps.
        trained = np.arange(float(int(size * strength)))[::-1]
    steps = _required(config, steps)
    if not 1 <= steps <= len(trained):
        raise config.refuse_argument("steps", steps, f"a number from 1 to {len(trained)}")
    chosen = np.floor(np.linspace(0, len(trained), num=steps, endpoint=False)).astype(int)
    return trained[chosen][begin:]
