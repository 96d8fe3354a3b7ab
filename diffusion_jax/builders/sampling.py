"""The sampler, from a config."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from jax.sharding import Mesh

from diffusion_jax import config as configs
from diffusion_jax.builders.engine import mesh
from diffusion_jax.builders.models import Model
from diffusion_jax.config import Config
from diffusion_jax.diffusion import (
    schedules,
    time_grids,
)
from diffusion_jax.errors import ConfigError, named, section, unknown_name
from diffusion_jax.parallel.mesh import make_mesh
from diffusion_jax.pipelines.options import SamplingOptions
from diffusion_jax.pipelines.pixel import PixelPipeline

PyTree = Any


def sampling_mesh(config: Config) -> Mesh:
    """The mesh of the training where it fits the devices at hand, else all of them in one axis."""
    try:
        return mesh(config)
    except ConfigError:
        return make_mesh()


def sampling_options(config: Config, built: Model) -> SamplingOptions:
    """The defaults of `sample`."""
    s = config.sampling
    with named("config.sampling."):
        return SamplingOptions.of(
            solver=s.solver,
            steps=s.steps,
            guidance=s.guidance,
            guidance_interval=s.guidance_interval,
            guidance_rescale=s.guidance_rescale,
            threshold=_threshold(s.threshold, built.spec.kind),
            threshold_percentile=s.threshold_percentile,
            solver_options={"ddim": s.ddim.to_dict(), "ddpm": s.ddpm.to_dict()},
            batch_size=s.batch_size,
        )


def _threshold(name: str, kind: str) -> str:
    known = ("auto", "none", "static", "dynamic")
    if name not in known:
        raise ConfigError(unknown_name("config.sampling.threshold", name, known))
    if name == "auto":
        return "static" if kind == "image" else "none"
    if name != "none" and kind != "image":
        # Bits are probabilities already; points have no range to be clipped to.
        raise ConfigError(
            f"config.sampling.threshold={name!r}: {kind} are not clipped; expected 'auto' or 'none'"
        )
    return name


def time_grid(config: Config, built: Model) -> Callable[[int], np.ndarray]:
    """`steps -> times` from 1 to 0, as the config names it."""
    name, _ = configs.component(config.sampling.grid, "sampling.grid")
    if name == "uniform":
        return time_grids.uniform
    if built.schedule is None:
        raise ConfigError(
            f"config.sampling.grid.name={name!r}: the process {config.process.name!r} has no "
            "schedule of noise levels; expected 'uniform'"
        )
    if name == "shifted":
        grid = functools.partial(_shifted, config.sampling.grid.shifted.shift)
    else:
        grid = _karras(config, built.schedule)
    try:
        grid(max(config.sampling.steps, 1))
    except (ValueError, ArithmeticError) as error:
        options = ", ".join(f"{k}={v!r}" for k, v in config.sampling.grid[name].to_dict().items())
        raise ConfigError(f"config.sampling.grid.{name}.{options}: {error}") from error
    return grid


def _shifted(shift: float, steps: int) -> np.ndarray:
    return time_grids.shifted(time_grids.uniform(steps), shift)


def _karras(config: Config, noise_schedule: schedules.Schedule) -> Callable[[int], np.ndarray]:
    """Karras et al. 2022, eq. 5, between the noise levels of t = 1 (0.998 where alpha(1) = 0)
    and sigma/alpha = 0.002, or the least that the schedule "edm" knows."""
    top = 1.0 if noise_schedule.alpha(1.0) > 0 else 0.998
    section_config = config.process.gaussian.schedule
    return functools.partial(
        time_grids.karras,
        noise_schedule,
        sigma_min=section_config.edm.sigma_min if section_config.name == "edm" else 0.002,
        sigma_max=float(np.exp(-0.5 * noise_schedule.logsnr(top))),
        rho=config.sampling.grid.karras.rho,
    )


def pipeline(config: Config, built: Model, params: PyTree, on: Mesh) -> PixelPipeline:
    """The sampler of a trained model."""
    dropouts = config.objective[config.objective.name]
    with section("sampling"):
        return PixelPipeline(
            params=params,
            denoiser=built.denoiser,
            process=built.process,
            schedule=built.schedule,
            spec=built.spec,
            conditions=built.conditions,
            always=tuple(c for c in built.conditions if not dropouts[f"{c}_dropout"]),
            times=time_grid(config, built),
            mesh=on,
            defaults=sampling_options(config, built),
        )
