"""Running a plan: a network wrapped as a denoiser, and the loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from diffusion_jax.diffusion import solvers
from diffusion_jax.diffusion.broadcasting import expand
from diffusion_jax.diffusion.denoiser import Denoised, Denoiser, split_variance
from diffusion_jax.diffusion.predictions import to_x0_eps
from diffusion_jax.diffusion.solvers.stepping import Noise, Result, Start
from diffusion_jax.diffusion.thresholding import clip_x0, dynamic_threshold
from diffusion_jax.interop.scheduler_plan import SchedulerPlan

Predict = Callable[[Any, Any], Any]


def denoiser(plan: SchedulerPlan, predict: Predict) -> Denoiser:
    """The denoiser that a plan's solver asks for: evaluation k reads the plan's k-th entries.

    Args:
      plan: of the loop in which it is used, and of no other, since it counts its evaluations.
      predict: (model input [B, ...], timestep float32 [B]) -> output [B, ...], with parameters and
        conditioning bound; with twice the channels, on the last axis, for a learned variance.
    """
    scales = plan.input_scales

    def step(x: Any, t: Any, count: Any) -> tuple[Denoised, Any]:
        del t
        alpha, sigma, scale = (_at(v, count, x) for v in (plan.alphas, plan.sigmas, scales))
        told = jnp.asarray(plan.timesteps, jnp.float32)[count]
        output = predict(scale * x, jnp.broadcast_to(told, x.shape[:1]))
        output, fraction = split_variance(output, x.shape, plan.learned_variance)
        if plan.flipped:
            output = -output
        x0, eps = to_x0_eps(plan.prediction, output, x, alpha, sigma, sigma_data=plan.sigma_data)
        return Denoised(x0, eps, fraction), count + 1

    return _restricted(plan, Denoiser(step, init=lambda x: jnp.zeros((), jnp.int32)))


def sample(
    plan: SchedulerPlan,
    predict: Predict,
    x: Start,
    *,
    key: Array | None = None,
    noise: Noise | None = None,
    trajectory: bool = False,
) -> Result:
    """The state at the end of a plan's loop, from x [B, ...] at its start.

    Args:
      plan: from `schedulers.plan`.
      predict: as in `denoiser`.
      x: `plan.initial_scale` times standard noise, or data with noise added at the levels that
        `plan.noise_levels` says.
      key: as for all solvers; needed where the solver draws noise, unless `noise` is given.
      noise: as for all solvers; `plan.draws` says which draw of diffusers belongs to which step.
      trajectory: whether all states are returned as well.

    Raises:
      ValueError: without key and noise where the solver draws noise.
    """
    solver = solvers.get(plan.solver)
    return solver(
        denoiser(plan, predict),
        plan.schedule,
        plan.times,
        x,
        key=key,
        noise=noise,
        trajectory=trajectory,
        **plan.options,
    )


def _at(values: Any, count: Any, x: Any) -> Any:
    """The entry of this evaluation, in the type of x."""
    return expand(jnp.asarray(values)[count], x)


def _restricted(plan: SchedulerPlan, plain: Denoiser) -> Denoiser:
    """With the clipping or thresholding of x0 that the plan asks for."""
    if plan.threshold is not None:
        return dynamic_threshold(plain, *plan.threshold)
    if plan.clip is not None:
        return clip_x0(plain, -plan.clip, plan.clip)
    return plain
