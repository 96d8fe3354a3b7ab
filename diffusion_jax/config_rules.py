"""What can be said against a config before anything is built from it."""

from __future__ import annotations

import math
from typing import Any

from diffusion_jax import config as configs
from diffusion_jax.config import Config, flatten
from diffusion_jax.errors import ConfigError, unknown_name


def validate(config: Config) -> None:
    """Checks ranges that need no other object to be judged.

    Raises:
        ConfigError: one line with field, value and what was expected.
    """
    _check_fields(config)
    for path, value in flatten(config):
        _check_value(path, value)
    if config.batch_size % config.accumulation:
        lower = config.batch_size - config.batch_size % config.accumulation
        higher = lower + config.accumulation
        nearest = f"the next are {lower} and {higher}" if lower else f"the next is {higher}"
        raise ConfigError(
            f"config.batch_size={config.batch_size} is not a multiple of "
            f"config.accumulation={config.accumulation}; {nearest}"
        )
    if config.compute_dtype not in ("auto", "float32", "bfloat16"):
        known = ("auto", "float32", "bfloat16")
        raise ConfigError(unknown_name("config.compute_dtype", config.compute_dtype, known))
    averages = (*config.ema.decays, *config.ema.powers)
    if config.sampling.ema not in ("", *averages):
        message = unknown_name("config.sampling.ema", config.sampling.ema, averages)
        raise ConfigError(f"{message}; or '' for the weights themselves")
    for name, decay in config.ema.decays.items():
        if not 0 <= decay < 1:
            raise ConfigError(f"config.ema.decays.{name}={decay!r}: expected 0 <= decay < 1")
    if config.logging.profile_at > config.steps:
        raise ConfigError(
            f"config.logging.profile_at={config.logging.profile_at}: expected at most "
            f"config.steps={config.steps}, or 0 for no profile"
        )


def _check_fields(config: Config) -> None:
    """A config that was not made from `base()`: unknown fields, wrong kinds, missing fields."""
    if not isinstance(config, configs.ConfigDict):
        raise ConfigError(
            f"config={config!r}: expected a ConfigDict made from diffusion_jax.config.base()"
        )
    configs.from_json(config.to_dict())
    given = {path for path, _ in flatten(config)}
    open_sections = tuple(f"{path.removeprefix('config.')}." for path in configs.OPEN_SECTIONS)
    missing = [
        f"config.{path}"
        for path, _ in flatten(configs.base())
        if path not in given and not path.startswith(open_sections)
    ]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ConfigError(
            f"{', '.join(missing[:3])}{more}: missing; expected a config made from "
            "diffusion_jax.config.base()"
        )


def _check_value(path: str, value: Any) -> None:
    if isinstance(value, list):
        if path.endswith(".scalars"):
            _check_names(path, value)
        elif not all(isinstance(v, int | float) and math.isfinite(v) for v in value):
            raise ConfigError(f"config.{path}={tuple(value)!r}: expected numbers, such as (1, 2)")
        return
    if value is None:
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"config.{path}={value!r}: expected a finite number")
    if path in _MINIMA and value < _MINIMA[path]:
        raise ConfigError(f"config.{path}={value!r}: expected at least {_MINIMA[path]}")
    if path in _POSITIVE and value <= 0:
        raise ConfigError(f"config.{path}={value!r}: expected a number above 0")
    if path in _SEEDS and value >= 2**32:
        raise ConfigError(f"config.{path}={value!r}: expected less than 2**32")
    if path in _RATES and not 0 <= value < 1:
        raise ConfigError(f"config.{path}={value!r}: expected a number in [0, 1)")
    if path.endswith("_dropout") and not 0 <= value <= 1:
        raise ConfigError(f"config.{path}={value!r}: expected a probability between 0 and 1")
    if path == "objective.denoising.alignment.workdir.time" and not 0 <= value <= 1:
        raise ConfigError(f"config.{path}={value!r}: expected a time from 0 to 1")


def _check_names(path: str, values: list[Any]) -> None:
    if not all(isinstance(value, str) and value for value in values):
        raise ConfigError(f"config.{path}={tuple(values)!r}: expected names, such as ('size',)")


_SEEDS = ("seed", "sampling.seed", "evaluation.seed", "data.points.seed", "data.markov.seed")
_POSITIVE = (
    "optimizer.adamw.eps",
    "optimizer.muon.eps",
    "optimizer.muon.rms",
    "objective.denoising.time.log_normal.std",
    "objective.denoising.time.logit_normal.std",
    "process.gaussian.sigma_data",
    "objective.denoising.weighting.min_snr.gamma",
)
_RATES = (
    "optimizer.adamw.b1",
    "optimizer.adamw.b2",
    "optimizer.muon.b1",
    "optimizer.muon.b2",
    "optimizer.muon.beta",
)
_MINIMA = {
    "steps": 1,
    "seed": 0,
    "batch_size": 1,
    "accumulation": 1,
    "data.prefetch": 1,
    "data.tfds.memory": 0,
    "data.tfds.max_unreadable": 0,
    "data.points.size": 1,
    "data.points.held_out": 1,
    "data.heartbeat.size": 1,
    "data.markov.size": 1,
    "data.markov.held_out": 1,
    "data.markov.seed": 0,
    "objective.variational.num_steps": 0,
    "objective.variational.decoder.pixels.count": 2,
    "objective.variational.decoder.dequantised.count": 2,
    "process.gaussian.schedule.learned.units": 1,
    "objective.continuous.bound_steps": 0,
    "data.heartbeat.held_out": 1,
    "guard.limit": 0,
    "checkpoint.every": 1,
    "checkpoint.keep_last": 1,
    "checkpoint.keep_every": 1,
    "logging.every": 1,
    "logging.profile_at": 0,
    "logging.profile_steps": 1,
    "validation.every": 0,
    "validation.examples": 0,
    "validation.batch_size": 1,
    "evaluation.every": 0,
    "evaluation.num": 1,
    "evaluation.seed": 0,
    "sampling.every": 0,
    "sampling.num": 1,
    "sampling.batch_size": 1,
    "sampling.steps": 1,
    "sampling.seed": 0,
    "data.points.seed": 0,
    "optimizer.learning_rate": 0,
    "optimizer.clip_norm": 0,
    "optimizer.final_scale": 0,
    "optimizer.adaptive_clip": 0,
    "optimizer.cooldown_steps": 0,
    "optimizer.reference_steps": 0,
    "optimizer.adamw.weight_decay": 0,
    "optimizer.muon.newton_schulz_steps": 1,
    "optimizer.muon.weight_decay": 0,
    "objective.denoising.uncertainty.mlp.channels": 1,
    "objective.denoising.alignment.hidden": 1,
    "objective.denoising.alignment.workdir.features_after": 1,
    "objective.denoising.alignment.weight": 0,
    "optimizer.warmup_steps": 0,
}
