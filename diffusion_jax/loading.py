"""From a trained workdir to its sampler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from diffusion_jax import averages, builders, start, workdir
from diffusion_jax import config as configs
from diffusion_jax.checkpoints import Checkpointer
from diffusion_jax.config import Config
from diffusion_jax.errors import ConfigError, named
from diffusion_jax.pipelines.guiding import Weak
from diffusion_jax.pipelines.pixel import PixelPipeline


def load(
    path: str | Path,
    *,
    ema: str | None = None,
    ema_length: float | None = None,
    note: Callable[[str], None] | None = None,
    weak: str | Path | None = None,
    weak_ema: str | None = None,
    weak_step: int | None = None,
) -> PixelPipeline:
    """The sampler of a trained workdir, with the averaged weights its config names.

    Needs neither the data nor the devices of the training: where the config's mesh does not fit
    the devices at hand, samples are split over all of them.

    Args:
        path: the workdir.
        ema: another stored average; "" takes the raw weights.
        ema_length: makes an average of this relative length (sigma_rel, a share of the run) from
            the power function averages (`config.ema.powers`) in all checkpoints that were kept.
        note: takes a line about what that average is made from.
        weak: workdir of the weaker model of autoguidance, trained on the same data by the same
            process; None takes the one of the config, "" none. It may be `path` itself.
        weak_ema: its average; "" takes the raw weights.
        weak_step: its step, one that was kept.

    Raises:
        ConfigError: no workdir there, nothing to restore in it, or no such average; a weaker model
            of other data or another process.
    """
    if ema is not None and ema_length is not None:
        raise ConfigError(f"ema={ema!r}, ema_length={ema_length!r}: expected one of them")
    config = workdir.read_config(path)
    start.enable_cache(config)
    built = builders.model(config, workdir.read_spec(path))
    on = builders.sampling_mesh(config)
    compiled = builders.compiled(config, built, on)
    with Checkpointer(workdir.folder_of(path) / workdir.CHECKPOINTS, read_only=True) as checkpoints:
        params = averages.stored_weights(
            checkpoints,
            compiled.abstract_state,
            name=config.sampling.ema if ema is None else ema,
            length=ema_length,
            powers=config.ema.powers.to_dict(),
            note=note,
        )
    if weak is None and (weak_ema is not None or weak_step is not None):
        weak = path
    if weak is None:
        found = weaker_model(config, built, on, own=path)
    else:
        found = _weaker(weak, config, built, on, weak_ema, weak_step) if weak else None
    return builders.pipeline(config, built, params, on, found)


FIELD = "config.sampling.guidance_by.autoguidance"


def weaker_model(
    config: Config, built: builders.Model, on: Mesh, *, own: str | Path | None = None
) -> Weak | None:
    """The weaker model that the config names, or None where it names another guidance.

    Args:
        config: of the run that is to be guided.
        built: its model.
        on: its mesh.
        own: its workdir, if another of its steps or averages may be the weaker model.

    Raises:
        ConfigError: it cannot be loaded or is no such model.
    """
    if config.sampling.guidance_by.name != "autoguidance":
        return None
    chosen = config.sampling.guidance_by.autoguidance
    alone = not chosen.workdir and chosen.step is None and chosen.ema is None
    if alone or (own is None and not chosen.workdir):
        raise ConfigError(
            f"{FIELD}.workdir='': expected the workdir of a weaker model"
            + (", or a step or ema of this run" if own is not None else " that is trained already")
        )
    path = chosen.workdir or own
    with named(f"{FIELD}."):
        return _weaker(path, config, built, on, chosen.ema, chosen.step, "workdir")


def _weaker(
    path: Any,
    config: Config,
    built: builders.Model,
    on: Mesh,
    ema: str | None,
    step: int | None,
    argument: str = "weak",
) -> Weak:
    try:
        other, spec = workdir.read_config(path), workdir.read_spec(path)
    except ConfigError as error:
        # Which of two workdirs it is.
        raise ConfigError(f"{argument}{str(error).removeprefix('workdir')}") from error
    field, own = f"{argument}={str(path)!r}", built.spec
    if (spec.shape, spec.kind) != (own.shape, own.kind):
        raise ConfigError(
            f"{field}: its data are {spec.kind} of shape {spec.shape}; expected {own.kind} of "
            f"{own.shape}"
        )
    model = builders.model(other, spec)
    shared = [name for name in model.conditions if name in built.conditions]
    sizes = [(s.num_classes, s.text_length, s.scalars) for s in (spec, own)]
    if shared and sizes[0] != sizes[1]:
        raise ConfigError(f"{field}: its labels, captions or numbers are others than the model's")
    if _process(other) != _process(config):
        raise ConfigError(
            f"{field}: its process {_process(other)} is not the model's {_process(config)}"
        )
    if built.learns_schedule:
        raise ConfigError(f"{field}: two models with learned schedules share no noise levels")
    abstract = builders.compiled(other, model, on).abstract_state
    with Checkpointer(workdir.folder_of(path) / workdir.CHECKPOINTS, read_only=True) as checkpoints:
        name = other.sampling.ema if ema is None else ema
        params = averages.stored_weights(checkpoints, abstract, name=name, step=step)
    return Weak(params=params, denoiser=model.denoiser, conditions=tuple(shared))


def _process(config: Config) -> str:
    """What a state of some time is, in words; a network may predict what it likes of it."""
    name, options = configs.component(config.process, "process")
    if name != "gaussian":
        return f"{name} {options}"
    kind, options = configs.component(config.process.gaussian.schedule, "schedule")
    return f"{name} {kind} {options}"
