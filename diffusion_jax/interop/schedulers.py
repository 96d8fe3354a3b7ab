"""`plan`: a diffusers scheduler config, with the number of steps, in our terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from diffusion_jax.diffusion.time_grids import check_times
from diffusion_jax.errors import ConfigError, unknown_name
from diffusion_jax.interop import (
    continuous_schedulers,
    discrete_schedulers,
    exponential_schedulers,
    level_schedulers,
    pndm_scheduler,
)
from diffusion_jax.interop.scheduler_config import SchedulerConfig
from diffusion_jax.interop.scheduler_plan import SchedulerPlan
from diffusion_jax.interop.timestep_lists import check_lists

Family = Callable[[SchedulerConfig, int | None, Mapping[str, Any]], SchedulerPlan]

_CHURN = ("s_churn", "s_tmin", "s_tmax", "s_noise")

SCHEDULERS: dict[str, tuple[Family, tuple[str, ...]]] = {
    "DDPMScheduler": (discrete_schedulers.ddpm, ("timesteps", "begin_index")),
    "DDIMScheduler": (
        discrete_schedulers.ddim,
        ("eta", "use_clipped_model_output", "begin_index"),
    ),
    "UnCLIPScheduler": (discrete_schedulers.unclip, ("begin_index",)),
    "PNDMScheduler": (pndm_scheduler.pndm, ("begin_index",)),
    "LCMScheduler": (
        discrete_schedulers.lcm,
        ("original_inference_steps", "timesteps", "strength", "begin_index"),
    ),
    "TCDScheduler": (
        discrete_schedulers.tcd,
        ("original_inference_steps", "timesteps", "strength", "eta", "begin_index"),
    ),
    "EulerDiscreteScheduler": (
        level_schedulers.euler,
        ("timesteps", "sigmas", *_CHURN, "begin_index"),
    ),
    "EulerAncestralDiscreteScheduler": (level_schedulers.euler_ancestral, ("begin_index",)),
    "HeunDiscreteScheduler": (level_schedulers.heun, ("timesteps", "begin_index")),
    "KDPM2DiscreteScheduler": (level_schedulers.kdpm2, ("begin_index",)),
    "KDPM2AncestralDiscreteScheduler": (level_schedulers.kdpm2, ("begin_index",)),
    "LMSDiscreteScheduler": (level_schedulers.lms, ("order", "begin_index")),
    "DPMSolverMultistepScheduler": (
        exponential_schedulers.multistep,
        ("timesteps", "mu", "begin_index"),
    ),
    "DPMSolverSinglestepScheduler": (
        exponential_schedulers.singlestep,
        ("timesteps", "mu", "begin_index"),
    ),
    "DEISMultistepScheduler": (exponential_schedulers.deis, ("mu", "begin_index")),
    "UniPCMultistepScheduler": (exponential_schedulers.unipc, ("sigmas", "mu", "begin_index")),
    "EDMEulerScheduler": (continuous_schedulers.edm_euler, (*_CHURN, "begin_index")),
    "EDMDPMSolverMultistepScheduler": (continuous_schedulers.edm_multistep, ("begin_index",)),
    "FlowMatchEulerDiscreteScheduler": (
        continuous_schedulers.flow_euler,
        ("sigmas", "timesteps", "mu", *_CHURN, "begin_index"),
    ),
    "FlowMatchHeunDiscreteScheduler": (
        continuous_schedulers.flow_heun,
        (*_CHURN, "begin_index"),
    ),
}
"""Class name -> the function that reads it, and the arguments that it takes besides `steps`."""


def plan(
    config: Mapping[str, Any], steps: Any = None, **set_timesteps_arguments: Any
) -> SchedulerPlan:
    """What a `scheduler_config.json` means, run with this many steps.

    Args:
      config: the file's content; `_class_name` says the class, one of `SCHEDULERS`. Fields that it
        does not have take the defaults of diffusers.
      steps: `num_inference_steps`, a whole number; None where an argument gives the timesteps.
      **set_timesteps_arguments: what else the class's `set_timesteps` and `step` take (`timesteps`,
        `sigmas`, `mu`, `eta`, `s_churn`, ...), and `begin_index`, the step to begin at.

    Raises:
      ConfigError: a class, field, value or argument that is unknown or not supported; one line
        that names it and what is supported.
    """
    read = SchedulerConfig(config)
    family, known = SCHEDULERS[read.class_name]
    for name in set_timesteps_arguments:
        if name not in known:
            raise ConfigError(f"{read.class_name}: {unknown_name('argument', name, known)}")
    given = {name: value for name, value in set_timesteps_arguments.items() if value is not None}
    if steps is not None:
        steps = int(read.checked("steps", steps, least=1, whole=True))
    check_lists(read, steps, given)
    try:
        made = family(read, steps, given)
        check_times(made.times)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{read.class_name}: {error}") from error
    return made
