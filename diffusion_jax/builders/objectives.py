"""What is minimised, from a config."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from diffusion_jax import config as configs
from diffusion_jax.builders.models import Model
from diffusion_jax.config import Config
from diffusion_jax.diffusion import (
    likelihood,
    time_grids,
    time_sampling,
    weightings,
)
from diffusion_jax.errors import ConfigError, named, section, unknown_name
from diffusion_jax.networks import Network
from diffusion_jax.objectives.adaptive_time import AdaptiveTime
from diffusion_jax.objectives.alignment import Alignment, FrozenEncoder
from diffusion_jax.objectives.base import Context, Objective
from diffusion_jax.objectives.continuous import Continuous
from diffusion_jax.objectives.denoising import Denoising
from diffusion_jax.objectives.dequantised import Dequantised
from diffusion_jax.objectives.gaussian_bound import GaussianBound
from diffusion_jax.objectives.uncertainty import Uncertainty
from diffusion_jax.objectives.variational import Variational

PyTree = Any
FEATURED = ("dit", "uvit")
"""Networks with inner features."""


def objective(config: Config, built: Model, encoder: FrozenEncoder | None = None) -> Objective:
    """What is minimised, and what the network asks for after each update.

    Args:
        config: the whole config.
        built: network, process and data.
        encoder: features are aligned with those of this one, if there is one.
    """
    found = _objective(config, built, encoder)

    def post_update(params: PyTree, context: Context) -> PyTree:
        return built.network.post_update(found.post_update(params, context))

    return dataclasses.replace(found, post_update=post_update)


def _objective(config: Config, built: Model, encoder: FrozenEncoder | None) -> Objective:
    name, options = configs.component(config.objective, "objective")
    drop = {}
    for condition in built.conditions:
        drop[condition] = options[f"{condition}_dropout"]
    if name == "variational":
        function: Any = _variational(config, built, options, drop)
        width = dequantisation(config, built)
        if width is not None:
            function = Dequantised(inner=function, width=width)
        return Objective(function=function)
    if name == "continuous":
        return Objective(
            function=Continuous(estimate=built.estimate, process=built.process, drop=drop)
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
        alignment=_alignment(config, built, encoder),
    )
    return denoising.objective()


def _variational(
    config: Config, built: Model, options: Mapping[str, Any], drop: Mapping[str, float]
) -> Variational | GaussianBound:
    field = "objective.variational"
    if options["num_steps"] or built.learns_schedule:
        _check_unread(options)
    if options["num_steps"]:
        with section(f"{field}.num_steps"):
            times = time_grids.uniform(options["num_steps"])
        return Variational(
            estimate=built.estimate,
            process=built.process,
            process_of=built.process_of if built.learns_schedule else None,
            times=times,
            drop=drop,
        )
    if built.schedule is None:
        raise ConfigError(
            f"config.{field}.num_steps=0: continuous time is for the process 'gaussian'; expected "
            f"at least 1 for {config.process.name!r}"
        )
    first, proposal = options["first_time"], options["proposal"]
    if not built.learns_schedule:
        with named(f"config.{field}."), section(field):
            likelihood.check_levels(built.schedule, first, proposal, built.sigma_data)
    return GaussianBound(
        estimate=built.estimate,
        schedule_of=built.schedule_of,
        decoder=_decoder(config, built),
        first_time=first,
        proposal=proposal,
        sigma_data=built.sigma_data,
        drop=drop,
    )


def _check_unread(options: Mapping[str, Any]) -> None:
    """Raises ConfigError for options of continuous time that nothing reads."""
    field, defaults = "objective.variational", configs.base().objective.variational
    steps = options["num_steps"]
    why = f"num_steps={steps} has its own times" if steps else "a learned schedule has its own"
    for name in ("first_time", "proposal"):
        if options[name] != defaults[name]:
            raise ConfigError(
                f"config.{field}.{name}={options[name]!r}: not read, {why}; leave it at "
                f"{defaults[name]!r}"
            )


def _decoder(config: Config, built: Model) -> likelihood.Decoder:
    field = "objective.variational.decoder"
    name, options = configs.component(config.objective.variational.decoder, field)
    if name in ("density", "dequantised"):
        return likelihood.Density()
    if built.spec.kind != "image":
        raise ConfigError(
            f"config.{field}.name={name!r}: {built.spec.kind} have no pixels; expected 'density'"
        )
    with named(f"config.{field}.{name}."), section(f"{field}.{name}"):
        return likelihood.Pixels(options["count"], *built.spec.range)


def dequantisation(config: Config, built: Model) -> float | None:
    """The distance of the values that pixels have, where the bound is that on their probability by
    the decoder "dequantised"; else None."""
    if config.objective.name != "variational":
        return None
    field = "objective.variational.decoder"
    name, options = configs.component(config.objective.variational.decoder, field)
    steps = config.objective.variational.num_steps
    if name == "pixels" and steps:
        raise ConfigError(
            f"config.{field}.name='pixels': with num_steps={steps} the last step decodes; expected "
            "'density' or 'dequantised', or config.objective.variational.num_steps=0"
        )
    if name != "dequantised":
        return None
    if built.spec.kind != "image":
        raise ConfigError(
            f"config.{field}.name={name!r}: {built.spec.kind} have no pixels; expected 'density'"
        )
    with named(f"config.{field}.{name}."), section(f"{field}.{name}"):
        return likelihood.bin_width(options["count"], *built.spec.range)


def _adaptive(config: Config) -> AdaptiveTime | None:
    field = "objective.denoising.adaptive"
    name, options = configs.component(config.objective.denoising.adaptive, field)
    if name == "none":
        return None
    with named("config."), section(f"{field}.{name}"):
        return AdaptiveTime(stratified=config.objective.denoising.time.stratified, **options)


def _uncertainty(config: Config) -> Uncertainty | None:
    field = "objective.denoising.uncertainty"
    name, options = configs.component(config.objective.denoising.uncertainty, field)
    if name == "none":
        return None
    with section(f"{field}.{name}"):
        return Uncertainty(**options)


def _alignment(config: Config, built: Model, encoder: FrozenEncoder | None) -> Alignment | None:
    if encoder is None:
        return None
    own = config.objective.denoising.alignment
    x = jax.ShapeDtypeStruct((1, *built.spec.shape), "float32")
    noise = jax.ShapeDtypeStruct((1,), "float32")
    with named("config."):
        found = feature_shape(config.network.name, built.network, x, noise)
        part = Alignment(
            encode=encoder.encode,
            feature_dim=found.shape[-1],
            target_dim=encoder.dim,
            hidden=own.hidden,
            weight=own.weight,
        )
        params = jax.eval_shape(lambda: part.init(jax.random.key(0)))
        with section("objective.denoising.alignment"), named("objective.denoising."):
            jax.eval_shape(part, params, found, {part.frozen: encoder.params}, x)
    return part


def feature_shape(name: str, network: Network, x: Any, noise: Any) -> Any:
    """Shape and dtype of the inner features of a network; `x` and `noise` may be shapes.

    Raises:
        ConfigError: a network of this kind has none, or gives none.
    """
    if name not in FEATURED:
        raise ConfigError(
            f"network.name={name!r} gives no features for an alignment; known: "
            f"{', '.join(FEATURED)}"
        )

    def features(key: Any, x: Any, noise: Any) -> Any:
        params = network.init(key)
        return network.apply(params, x, noise, {}, return_features=True)[1]

    return jax.eval_shape(features, jax.eval_shape(lambda: jax.random.key(0)), x, noise)


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
