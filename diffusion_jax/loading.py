"""From a trained workdir to its sampler."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from diffusion_jax import averages, builders, start, workdir
from diffusion_jax import config as configs
from diffusion_jax.best_checkpoint import asked_step
from diffusion_jax.checkpoints import Checkpointer
from diffusion_jax.config import Config
from diffusion_jax.errors import ConfigError
from diffusion_jax.pipelines.guiding import Weak
from diffusion_jax.pipelines.options import whole
from diffusion_jax.pipelines.pixel import PixelPipeline

PyTree = Any
FIELD = "config.sampling.guidance_by.autoguidance"


def load(
    path: str | Path,
    *,
    ema: str | None = None,
    ema_length: float | None = None,
    checkpoint: int | str | None = None,
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
        checkpoint: a step that was kept, or "best" by the score that `config.evaluation.best`
            names; None takes the newest. Not with `ema_length`, which is made from all of them.
        note: takes a line about what that average is made from.
        weak: workdir of the weaker model of autoguidance, trained on the same data by the same
            process; None takes the one of the config, "" none. It may be `path` itself.
        weak_ema: its average; "" takes the raw weights.
        weak_step: its step, one that was kept. Without `weak`, both go over those of the weaker
            model that the config names, or are of `path` where it names none.

    Raises:
        ConfigError: no workdir there, nothing to restore in it, or no such average; a weaker model
            that is gone, or of other data or another process.
    """
    if ema is not None and ema_length is not None:
        raise ConfigError(f"ema={ema!r}, ema_length={ema_length!r}: expected one of them")
    if checkpoint is not None and ema_length is not None:
        raise ConfigError(
            f"checkpoint={checkpoint!r}, ema_length={ema_length!r}: expected one of them; such an "
            "average is made from all checkpoints"
        )
    if weak_step is not None:
        weak_step = whole("weak_step", weak_step, low=0)
    config = workdir.read_config(path)
    asked = _asked(config, path, weak, weak_ema, weak_step)
    start.enable_cache(config)
    built = builders.model(config, workdir.read_spec(path))
    on = builders.sampling_mesh(config)
    step = asked_step(path, checkpoint)
    params = _restored(path, config, built, on, ema=ema, length=ema_length, note=note, step=step)
    found = None if asked is None else _weaker(asked, config, built, on)
    return builders.pipeline(config, built, params, on, found)


def weaker_model(config: Config, built: builders.Model, on: Mesh) -> Weak | None:
    """The weaker model that the config of a training names, or None where it names none.

    Args:
        config: of the run that is to be guided.
        built: its model.
        on: its mesh.

    Raises:
        ConfigError: it cannot be loaded or is no such model.
    """
    asked = _of_config(config, None)
    return None if asked is None else _weaker(asked, config, built, on)


def _restored(
    path: str | Path,
    config: Config,
    built: builders.Model,
    on: Mesh,
    *,
    ema: str | None,
    **choice: Any,
) -> PyTree:
    """The parameters of a workdir, of its own average where `ema` is None; `choice`: length, note
    or step of `averages.stored_weights`."""
    abstract = builders.compiled(config, built, on).abstract_state
    with Checkpointer(workdir.folder_of(path) / workdir.CHECKPOINTS, read_only=True) as checkpoints:
        return averages.stored_weights(
            checkpoints,
            abstract,
            name=config.sampling.ema if ema is None else ema,
            powers=config.ema.powers.to_dict(),
            **choice,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Asked:
    """Which weaker model.

    Attributes:
        path: its workdir.
        ema, step: None for its own average and for the newest.
        names: what the user calls its workdir, ema and step.
        remedy: what to do where it cannot be loaded.
    """

    path: str | Path
    ema: str | None
    step: int | None
    names: Mapping[str, str]
    remedy: str


def _asked(
    config: Config, own: str | Path, weak: str | Path | None, ema: str | None, step: int | None
) -> _Asked | None:
    """The weaker model that the arguments of `load` name, or that of the config."""
    given: dict[str, Any] = {"ema": ema, "step": step}
    given = {name: value for name, value in given.items() if value is not None}
    if weak == "":
        if not given:
            return None
        name, value = next(iter(given.items()))
        raise ConfigError(f"weak_{name}={value!r}: weak='' leaves out the weaker model; leave one")
    if weak is None and (not given or _is_named(config)):
        found = _of_config(config, own)
        if found is None:
            return None
        names = {**found.names, **{name: f"weak_{name}" for name in given}}
        return dataclasses.replace(found, names=names, **given)
    return _Asked(
        path=own if weak is None else weak,
        ema=ema,
        step=step,
        names={"workdir": "weak", "ema": "weak_ema", "step": "weak_step"},
        remedy="expected that of a weaker model, or weak='' (--weak=) to leave it out",
    )


def _is_named(config: Config) -> bool:
    """Whether the config says which weaker model there is."""
    by = config.sampling.guidance_by
    chosen = by.autoguidance
    some = bool(chosen.workdir) or chosen.step is not None or chosen.ema is not None
    return by.name == "autoguidance" and some


def _of_config(config: Config, own: str | Path | None) -> _Asked | None:
    """The weaker model that the config names; `own`: the workdir of its run, if another step or
    average of that may be it."""
    if config.sampling.guidance_by.name != "autoguidance":
        return None
    chosen = config.sampling.guidance_by.autoguidance
    if not _is_named(config) or (own is None and not chosen.workdir):
        raise ConfigError(
            f"{FIELD}.workdir='': expected the workdir of a weaker model"
            + (", or a step or ema of this run" if own is not None else " that is trained already")
        )
    there = "name another with weak=<a workdir> (--weak=DIR), or weak='' (--weak=) to leave it out"
    while_trained = "name another, or config.sampling.guidance_by.name='classifier_free'"
    return _Asked(
        path=chosen.workdir or own or "",
        ema=chosen.ema,
        step=chosen.step,
        names={name: f"{FIELD}.{name}" for name in ("workdir", "ema", "step")},
        remedy=while_trained if own is None else there,
    )


def _weaker(asked: _Asked, config: Config, built: builders.Model, on: Mesh) -> Weak:
    with _named_as(asked):
        other, spec = workdir.read_config(asked.path), workdir.read_spec(asked.path)
        model = builders.model(other, spec)
    _check(f"{asked.names['workdir']}={str(asked.path)!r}", model, other, built, config)
    with _named_as(asked):
        params = _restored(asked.path, other, model, on, ema=asked.ema, step=asked.step)
    shared = tuple(name for name in model.conditions if name in built.conditions)
    return Weak(params=params, denoiser=model.denoiser, conditions=shared)


@contextlib.contextmanager
def _named_as(asked: _Asked) -> Iterator[None]:
    """Says of an error in which of two workdirs it is, and how to go on."""
    try:
        yield
    except ConfigError as error:
        field, _, rest = str(error).partition("=")
        if field in ("ema", "step"):
            name = asked.names[field]
            # The error lists those that there are; those of a config may all be of no use.
            more = f"; {asked.remedy}" if name.startswith("config.") else ""
            raise ConfigError(f"{name}={rest}{more}") from error
        shown = f"={rest}" if field == "workdir" else f"={str(asked.path)!r}: {error}"
        raise ConfigError(f"{asked.names['workdir']}{shown}; {asked.remedy}") from error


def _check(
    field: str, model: builders.Model, other: Config, built: builders.Model, config: Config
) -> None:
    """Raises ConfigError unless the model of the config `other` can be the weaker one."""
    spec, own = model.spec, built.spec
    if (spec.shape, spec.kind) != (own.shape, own.kind):
        raise ConfigError(
            f"{field}: its data are {spec.kind} of shape {spec.shape}; expected {own.kind} of "
            f"{own.shape}"
        )
    shared = [name for name in model.conditions if name in built.conditions]
    sizes = [(s.num_classes, s.text_length, s.scalars) for s in (spec, own)]
    if shared and sizes[0] != sizes[1]:
        raise ConfigError(f"{field}: its labels, captions or numbers are others than the model's")
    for name in builders.never_left_out(other, model):
        if name not in shared:
            raise ConfigError(
                f"{field}: it was trained with {name}_dropout=0 and has no prediction without "
                f"{name}, which the model does not read; expected one trained with dropout"
            )
    if _process(other) != _process(config):
        raise ConfigError(
            f"{field}: its process {_process(other)} is not the model's {_process(config)}"
        )
    if built.learns_schedule:
        raise ConfigError(f"{field}: two models with learned schedules share no noise levels")


def _process(config: Config) -> str:
    """What a state of some time is, in words; a network may predict what it likes of it."""
    name, options = configs.component(config.process, "process")
    if name != "gaussian":
        return f"{name} {options}"
    kind, options = configs.component(config.process.gaussian.schedule, "schedule")
    return f"{name} {kind} {options}"
