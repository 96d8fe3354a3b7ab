"""The engine on its mesh, from a config."""

from __future__ import annotations

from typing import Any

import numpy as np
from jax.sharding import Mesh

from diffusion_jax import config as configs
from diffusion_jax.builders.discrete import bound_steps
from diffusion_jax.builders.models import Model
from diffusion_jax.builders.objectives import dequantisation, objective
from diffusion_jax.config import Config
from diffusion_jax.data import Source
from diffusion_jax.diffusion import (
    time_grids,
)
from diffusion_jax.errors import named, section
from diffusion_jax.evaluation.bound import BoundEvaluator
from diffusion_jax.objectives.alignment import FrozenEncoder
from diffusion_jax.parallel.mesh import make_mesh
from diffusion_jax.training.compiled import CompiledTrainer
from diffusion_jax.training.optimizer import (
    RateGroup,
    adamw,
    check_groups,
    muon,
    rate_groups,
    warmup_schedule,
)
from diffusion_jax.training.precision import Precision
from diffusion_jax.training.rates import RateSchedule
from diffusion_jax.training.step import Trainer

PyTree = Any


OPTIMIZERS = {"adamw": adamw, "muon": muon}


def _rate(config: Config) -> RateSchedule:
    """The learning rate of every update."""
    o = config.optimizer
    with named("config."), section("optimizer"):
        return warmup_schedule(
            o.schedule,
            o.learning_rate,
            steps=config.steps,
            warmup_steps=o.warmup_steps,
            final_scale=o.final_scale,
            cooldown_steps=o.cooldown_steps,
            reference_steps=o.reference_steps,
        )


def _groups(config: Config, rate: RateSchedule) -> tuple[RateGroup, ...]:
    with named("config."), section("parameter_groups"):
        return rate_groups(config.parameter_groups.to_dict(), rate)


def trainer(config: Config, built: Model, encoder: FrozenEncoder | None = None) -> Trainer:
    """The engine's pure functions; see `compiled`."""
    name, options = configs.component(config.optimizer, "optimizer")
    o = config.optimizer
    rate = _rate(config)
    groups = _groups(config, rate)
    with named("config."), section(f"optimizer.{name}"):
        optimizer = OPTIMIZERS[name](
            rate,
            clip_norm=o.clip_norm or None,
            adaptive_clip=o.adaptive_clip or None,
            groups=groups,
            **options,
        )
    with named("config."):
        return Trainer(
            objective=objective(config, built, encoder),
            init_params=built.network.init,
            optimizer=optimizer,
            learning_rate=rate,
            ema_decays=config.ema.decays.to_dict(),
            ema_warmup=config.ema.warmup,
            ema_powers=config.ema.powers.to_dict(),
            precision=Precision(o.precision),
            seed=config.seed,
            accumulation=config.accumulation,
        )


def compiled(
    config: Config, built: Model, on: Mesh, encoder: FrozenEncoder | None = None
) -> CompiledTrainer:
    """The engine on a mesh.

    Args:
        config: the whole config.
        built: network, process and data.
        on: the mesh.
        encoder: that of the alignment. Without one nothing is aligned: all that sampling needs.
    """
    result = CompiledTrainer(
        trainer(config, built, encoder), on, config.mesh.fsdp_min_size, config.deterministic
    )
    params = result.abstract_state.params
    with named("config."):
        check_groups(_groups(config, _rate(config)), params)
    return result


def bound(config: Config, built: Model, examples: Source, on: Mesh) -> BoundEvaluator:
    """The evaluator of the variational bound, with its floor where the data are enumerable."""
    sequences = None
    if built.spec.kind == "bits":
        sequences = examples.fetch(np.arange(min(len(examples), 4096)))["x"]
    return BoundEvaluator(
        denoiser=built.denoiser,
        process_of=built.process_of,
        times=time_grids.uniform(bound_steps(config)),
        seed=config.seed,
        mesh=on,
        width=dequantisation(config, built),
        per_dimension=built.spec.kind == "image",
        sequences=sequences,
    )


def mesh(config: Config) -> Mesh:
    """The device mesh over all processes."""
    sizes = config.mesh
    with named("config."):
        return make_mesh(sizes.data, sizes.fsdp, sizes.context, sizes.tensor)
