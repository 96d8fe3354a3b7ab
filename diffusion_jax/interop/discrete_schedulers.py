"""Schedulers that step between whole timesteps of a beta table: DDPM, DDIM, UnCLIP, PNDM, LCM, TCD.

Timestep i stands at t = (i + 1) / T; where a class goes below timestep 0, at t = 0 or, by
`set_alpha_to_one=False`, at timestep 0 once more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_jax.diffusion.beta_tables import Table
from diffusion_jax.errors import ConfigError
from diffusion_jax.interop.level_grids import falling
from diffusion_jax.interop.scheduler_config import SchedulerConfig
from diffusion_jax.interop.scheduler_plan import SchedulerPlan
from diffusion_jax.interop.scheduler_tables import alphabars, as_table, betas_of
from diffusion_jax.interop.timestep_lists import given_falling, spaced

PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}


def ddpm(config: SchedulerConfig, steps: int | None, arguments: Mapping[str, Any]) -> SchedulerPlan:
    """DDPM: every step goes to the next timestep of the list."""
    timesteps = _own_timesteps(config, steps, arguments)
    after = np.append(timesteps[1:], -1.0)
    return _ancestral(config, timesteps, after, arguments)


def unclip(
    config: SchedulerConfig, steps: int | None, arguments: Mapping[str, Any]
) -> SchedulerPlan:
    """UnCLIP: DDPM between both ends of the table, stepping as the published pipeline does."""
    size = config.size
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
    begin = config.begin(arguments, len(timesteps))
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
    timesteps = spaced(config, steps)
    stride = config.size // len(timesteps)
    timesteps = timesteps[config.begin(arguments, len(timesteps)) :]
    eta = config.argument(arguments, "eta", 0.0, least=0.0)
    clipped = bool(arguments.get("use_clipped_model_output", False))
    return table_plan(
        config,
        timesteps,
        timesteps - stride,
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
        options={"timestep_scaling": config.number("timestep_scaling")},
        draws=(1,) * (len(timesteps) - 1) + (0,),
    )


def tcd(config: SchedulerConfig, steps: int | None, arguments: Mapping[str, Any]) -> SchedulerPlan:
    """Trajectory consistency sampling; the last step goes to timestep 0."""
    timesteps = _distilled(config, steps, arguments)
    eta = config.argument(arguments, "eta", 0.3, least=0.0, most=1.0)
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
        # Of some numbers of steps diffusers' rounding of "trailing" leads below 0.
        expected = f"0 to {size - 1}; take another number of steps"
        raise config.refuse_argument("timestep", int(evaluated[outside][0]), expected)
    choices = {"UnCLIPScheduler": ("epsilon", "sample")}.get(config.class_name, PREDICTIONS)
    below = 0.0 if config.get("set_alpha_to_one", True) or np.isneginf(after[-1]) else 1.0 / size
    last = below if after[-1] < 0.0 else (after[-1] + 1.0) / size
    if not np.array_equal(timesteps[1:], after[:-1]):
        # The state is taken to be at the next timestep, wherever the step has led.
        options = {"stride": int(timesteps[0] - after[0]), **options}
    known = np.arange(float(size))
    alphas, sigmas = _levels(schedule, evaluated)
    prediction = PREDICTIONS[config.choose("prediction_type", choices)]
    if prediction == "eps" and (alphas == 0.0).any():
        raise ConfigError(
            f"{config.class_name}: prediction_type='epsilon' with rescale_betas_zero_snr: alpha is "
            f"0 at timestep {evaluated[alphas == 0.0][0]:g}; use 'v_prediction', or timesteps "
            "(timestep_spacing) without it"
        )
    return SchedulerPlan(
        scheduler=config.class_name,
        schedule=schedule,
        times=falling(config, np.append((timesteps + 1.0) / size, last)),
        options=options,
        timesteps=evaluated,
        alphas=alphas,
        sigmas=sigmas,
        prediction=prediction,
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
        ratio = config.number("dynamic_thresholding_ratio", least=0.0, most=1.0)
        return {"threshold": (ratio, config.number("sample_max_value"))}
    if config.get("clip_sample"):
        return {"clip": config.number("clip_sample_range", above=0.0)}
    return {}


def _own_timesteps(
    config: SchedulerConfig, steps: int | None, arguments: Mapping[str, Any]
) -> np.ndarray:
    """The caller's falling list of timesteps, or else those of the config's spacing."""
    if "timesteps" not in arguments:
        return spaced(config, steps)
    given = arguments["timesteps"]
    return given_falling(config, "timesteps", given, 0, config.size - 1, whole=True)


def _distilled(
    config: SchedulerConfig, steps: int | None, arguments: Mapping[str, Any]
) -> np.ndarray:
    """Timesteps of LCM and TCD: a choice among those that the student was distilled on."""
    size, given = config.size, arguments.get("original_inference_steps")
    strength = config.argument(arguments, "strength", 1.0, above=0.0, most=1.0)
    if "timesteps" in arguments:
        timesteps = _own_timesteps(config, steps, arguments)
        kept = _share(config, len(timesteps), strength)
        timesteps = timesteps[len(timesteps) - kept :]
        return timesteps[config.begin(arguments, kept) :]
    bounds = {"least": 1, "most": size}
    count = config.whole("original_inference_steps", **bounds)
    if given is not None:
        count = int(config.checked("original_inference_steps", given, whole=True, **bounds))
    trained = np.arange(1, _share(config, count, strength) + 1) * (size // count) - 1.0
    if given is not None and config.class_name == "TCDScheduler":
        # The class then chooses among all timesteps.
        trained = np.arange(float(_share(config, size, strength)))
    if steps is None or steps > len(trained):
        raise config.refuse_argument("steps", steps, f"a number from 1 to {len(trained)}")
    chosen = np.floor(np.linspace(0, len(trained), num=steps, endpoint=False)).astype(int)
    return trained[::-1][chosen][config.begin(arguments, steps) :]


def _share(config: SchedulerConfig, count: int, strength: float) -> int:
    """The steps, of `count`, that `strength` leaves."""
    kept = int(count * strength)
    if not kept:
        raise config.refuse_argument("strength", strength, f"at least 1/{count}, for one step")
    return kept
