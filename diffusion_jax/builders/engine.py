"""The engine on its mesh, from a config."""

from __future__ import annotations

from typing import Any

import numpy as np
from jax.sharding import Mesh

from diffusion_jax import config as configs
from diffusion_jax.builders.models import Model
from diffusion_jax.builders.objectives import objective
from diffusion_jax.config import Config
from diffusion_jax.data import Source
from diffusion_jax.diffusion import (
    time_grids,
)
from diffusion_jax.errors import named, section
from diffusion_jax.evaluation.bound import BoundEvaluator, floor_bits
from diffusion_jax.parallel.mesh import make_mesh
from diffusion_jax.training.compiled import CompiledTrainer
from diffusion_jax.training.optimizer import adamw, warmup_schedule
from diffusion_jax.training.step import Trainer

PyTree = Any


OPTIMIZERS = {"adamw": adamw}


def trainer(config: Config, built: Model) -> Trainer:
    """The engine's pure functions."""
    name, options = configs.component(config.optimizer, "optimizer")
    section_config = config.optimizer
    with section("optimizer"):
        rate = warmup_schedule(
            section_config.schedule,
            section_config.learning_rate,
            steps=config.steps,
            warmup_steps=section_config.warmup_steps,
            final_scale=section_config.final_scale,
        )
    optimizer = OPTIMIZERS[name](rate, clip_norm=section_config.clip_norm or None, **options)
    return Trainer(
        objective=objective(config, built),
        init_params=built.network.init,
        optimizer=optimizer,
        learning_rate=rate,
        ema_decays=config.ema.decays.to_dict(),
        ema_warmup=config.ema.warmup,
        seed=config.seed,
        accumulation=config.accumulation,
    )


def compiled(config: Config, built: Model, on: Mesh) -> CompiledTrainer:
    """The engine on a mesh."""
    return CompiledTrainer(
        trainer(config, built), on, config.mesh.fsdp_min_size, config.deterministic
    )


def bound(
    config: Config, built: Model, examples: Source, on: Mesh
) -> tuple[BoundEvaluator, dict[str, float]]:
    """The evaluator of the variational bound; its floor in bits, where the data are enumerable."""
    times = time_grids.uniform(config.objective.variational.num_steps)
    evaluator = BoundEvaluator(
        denoiser=built.denoiser, process=built.process, times=times, seed=config.seed, mesh=on
    )
    if built.spec.kind != "bits":
        return evaluator, {}
    sequences = examples.fetch(np.arange(min(len(examples), 4096)))["x"]
    floor = floor_bits(sequences, built.process, times)
    return evaluator, {} if floor is None else {"bound_floor_bits": floor}


def mesh(config: Config) -> Mesh:
    """The device mesh over all processes."""
    sizes = config.mesh
    with named("config."):
        return make_mesh(sizes.data, sizes.fsdp, sizes.context, sizes.tensor)
