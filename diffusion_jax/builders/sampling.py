"""The sampler, from a config."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from diffusion_jax import config as configs
from diffusion_jax.builders.engine import mesh
from diffusion_jax.builders.models import Model
from diffusion_jax.config import Config
from diffusion_jax.diffusion import schedules, time_grids
from diffusion_jax.diffusion.denoiser import Denoiser
from diffusion_jax.errors import ConfigError, named, section, unknown_name
from diffusion_jax.parallel.mesh import make_mesh
from diffusion_jax.pipelines.guidance_kinds import KINDS
from diffusion_jax.pipelines.guiding import Weak
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
    by, _ = configs.component(s.guidance_by, "sampling.guidance_by")
    with named("config.sampling."):
        return SamplingOptions.of(
            solver=s.solver,
            steps=s.steps,
            guidance=s.guidance,
            guidance_interval=s.guidance_interval,
            guidance_rescale=s.guidance_rescale,
            guidance_by=by,
            guidance_options={k: s.guidance_by[k].to_dict() for k, v in KINDS.items() if v.options},
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
    name, options = configs.component(config.sampling.grid, "sampling.grid")
    if name == "uniform":
        return time_grids.uniform
    if name == "given":
        grid = functools.partial(_given, options["times"])
    elif built.schedule is None:
        raise ConfigError(
            f"config.sampling.grid.name={name!r}: the process {config.process.name!r} has no "
            "schedule of noise levels; expected 'uniform' or 'given'"
        )
    elif name == "shifted":
        grid = functools.partial(_shifted, options, math.prod(built.spec.shape[:-1]))
    elif name in ("leading", "linspace", "trailing"):
        grid = functools.partial(getattr(time_grids, name), built.schedule.num_steps, **options)
    else:
        grid = _of_levels(config, built.schedule, name, options)
    try:
        grid(max(config.sampling.steps, 1))
    except (ValueError, ArithmeticError) as error:
        raise ConfigError(_grid_error(name, options, str(error))) from error
    return grid


def _grid_error(name: str, options: Mapping[str, Any], message: str) -> str:
    """What is wrong with a grid, under the field that it names, or else under all of its own."""
    field = f"config.sampling.grid.{name}"
    first = message.partition("=")[0]
    if first == "steps":
        return f"config.sampling.{message}"
    if first in options:
        return f"{field}.{message}"
    shown = ", ".join(f"{k}={v!r}" for k, v in options.items())
    return f"{field}{'.' if shown else ''}{shown}: {message}"


def _shifted(options: Mapping[str, Any], size: int, steps: int) -> np.ndarray:
    shift, base, terminal = options["shift"], options["base_size"], options["terminal"]
    if base:
        shift *= time_grids.resolution_shift(size, base)
    times = time_grids.shifted(time_grids.uniform(steps), shift, power=options["power"])
    return time_grids.terminal_shifted(times, terminal) if terminal else times


def _given(times: Sequence[float], steps: int) -> np.ndarray:
    grid = time_grids.given(times)
    if len(grid) != steps + 1:
        raise ValueError(f"{len(grid)} times for steps={steps}; expected {steps + 1}")
    return grid


def _of_levels(
    config: Config, noise_schedule: schedules.Schedule, name: str, options: Mapping[str, Any]
) -> Callable[[int], np.ndarray]:
    """Karras et al. 2022, eq. 5, or another spacing between the noise levels of t = 1 (0.998 where
    alpha(1) = 0) and sigma/alpha = 0.002, or the least that the schedule "edm" knows."""
    top = 1.0 if noise_schedule.alpha(1.0) > 0 else 0.998
    section_config = config.process.gaussian.schedule
    return functools.partial(
        time_grids.TIME_GRIDS[name],
        noise_schedule,
        sigma_min=section_config.edm.sigma_min if section_config.name == "edm" else 0.002,
        sigma_max=float(np.exp(-0.5 * noise_schedule.logsnr(top))),
        **options,
    )


def never_left_out(config: Config, built: Model) -> tuple[str, ...]:
    """Conditions that training never left out: there is no prediction without them."""
    dropouts = config.objective[config.objective.name]
    return tuple(name for name in built.conditions if not dropouts[f"{name}_dropout"])


def pipeline(
    config: Config, built: Model, params: PyTree, on: Mesh, weak: Weak | None = None
) -> PixelPipeline:
    """The sampler of a trained model; `weak`: the weaker one of autoguidance."""

    def perturbed(params: PyTree, conditioning: Mapping[str, Any]) -> Denoiser:
        # Built when a program asks for it.
        assert built.perturbed_denoiser is not None
        return built.perturbed_denoiser(params, conditioning)

    with section("sampling"):
        return PixelPipeline(
            params=params,
            denoiser=built.denoiser,
            process=built.process,
            schedule=built.schedule,
            spec=built.spec,
            conditions=built.conditions,
            always=never_left_out(config, built),
            times=time_grid(config, built),
            mesh=on,
            defaults=sampling_options(config, built),
            weak=weak,
            perturbed=perturbed if built.perturbed is not None else None,
            process_of=built.process_of if built.learns_schedule else None,
            sigma_data=built.sigma_data,
        )
