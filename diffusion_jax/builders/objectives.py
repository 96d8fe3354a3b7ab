"""What is minimised, from a config."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from diffusion_jax import config as configs
from diffusion_jax.builders.models import Model
from diffusion_jax.config import Config
from diffusion_jax.diffusion import (
    time_grids,
    time_sampling,
    weightings,
)
from diffusion_jax.errors import ConfigError, section, unknown_name
from diffusion_jax.objectives.adaptive_time import AdaptiveTime
from diffusion_jax.objectives.base import Objective
from diffusion_jax.objectives.denoising import Denoising
from diffusion_jax.objectives.uncertainty import Uncertainty
from diffusion_jax.objectives.variational import Variational

PyTree = Any


def objective(config: Config, built: Model) -> Objective:
    """What is minimised."""
    name, options = configs.component(config.objective, "objective")
    drop = {}
    for condition in built.conditions:
        field = f"{condition}_dropout"
        _check_probability(f"config.objective.{name}.{field}", options[field])
        drop[condition] = options[field]
    if name == "variational":
        with section("objective.variational.num_steps"):
            times = time_grids.uniform(options["num_steps"])
        return Objective(
            function=Variational(
                estimate=built.estimate, process=built.process, times=times, drop=drop
            )
        )
    denoising = Denoising(
        apply=built.network.apply,
        noise_input=built.network.noise_input,
        schedule=built.schedule,
        prediction=built.prediction,
        sample_time=_sample_time(config, built.schedule),
        weight=_weight(config, built),
        sigma_data=built.sigma_data,
        drop=drop,
        adaptive=_adaptive(config),
        uncertainty=_uncertainty(config),
    )
    return denoising.objective()


def _adaptive(config: Config) -> AdaptiveTime | None:
    field = "objective.denoising.adaptive"
    name, options = configs.component(config.objective.denoising.adaptive, field)
    if name == "none":
        return None
    with section(f"{field}.{name}"):
        return AdaptiveTime(stratified=config.objective.denoising.time.stratified, **options)


def _uncertainty(config: Config) -> Uncertainty | None:
    field = "objective.denoising.uncertainty"
    name, options = configs.component(config.objective.denoising.uncertainty, field)
    if name == "none":
        return None
    with section(f"{field}.{name}"):
        return Uncertainty(**options)


def _check_probability(field: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ConfigError(f"{field}={value!r}: expected a probability between 0 and 1")


def _sample_time(config: Config, noise_schedule: Any) -> Callable[[Any, Any, int], Any]:
    field = "objective.denoising.time"
    name, options = configs.component(config.objective.denoising.time, field)
    draw = functools.partial(time_sampling.TIME_SAMPLINGS[name], **options)
    with section(f"{field}.{name}"):
        draw(np.float64(0.5), noise_schedule)
    if not config.objective.denoising.time.stratified:
        return lambda u, stratum, cells: draw(u, noise_schedule)

    def stratified(u: Any, stratum: Any, cells: int) -> Any:
        return draw(time_sampling.stratified(u, stratum, cells), noise_schedule)

    return stratified


def _weight(config: Config, built: Model) -> Callable[[Any, Any], Any]:
    section_config = config.objective.denoising.weighting
    name = section_config.name
    if name not in weightings.WEIGHTINGS:
        field = "config.objective.denoising.weighting.name"
        raise ConfigError(unknown_name(field, name, weightings.WEIGHTINGS))
    options = section_config[name].to_dict() if name in section_config else {}
    return functools.partial(
        weightings.weight, name, built.prediction, sigma_data=built.sigma_data, **options
    )
