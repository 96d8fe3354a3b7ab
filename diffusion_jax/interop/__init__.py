"""What other libraries wrote, in our terms: the samplers of diffusers' scheduler configs.

`plan` reads a `scheduler_config.json` with the arguments that a pipeline gives it, and says what
the loop is in terms of `diffusion`: schedule, times, prediction, solver and its options, and what
the network is told at each evaluation. `denoiser` wraps a network by a plan; `sample` runs it.
"""

from diffusion_jax.interop.running import denoiser, sample
from diffusion_jax.interop.scheduler_plan import SchedulerPlan
from diffusion_jax.interop.schedulers import SCHEDULERS, plan

__all__ = ["SCHEDULERS", "SchedulerPlan", "denoiser", "plan", "sample"]
