"""From a config to plain objects: the only reader of a ConfigDict.

Everything here is built before the first compilation, so that a mistake in a config ends in one
line within seconds. Nothing below this room takes a config.
"""

from __future__ import annotations

from diffusion_jax.builders.discrete import bound_steps
from diffusion_jax.builders.engine import bound, compiled, mesh, trainer
from diffusion_jax.builders.models import (
    PRESETS,
    Model,
    model,
    network,
    resolve,
    schedule,
    source,
)
from diffusion_jax.builders.objectives import feature_shape, objective
from diffusion_jax.builders.sampling import (
    never_left_out,
    pipeline,
    sampling_mesh,
    sampling_options,
    time_grid,
)

__all__ = [
    "PRESETS",
    "Model",
    "bound",
    "bound_steps",
    "compiled",
    "feature_shape",
    "mesh",
    "model",
    "network",
    "never_left_out",
    "objective",
    "pipeline",
    "resolve",
    "sampling_mesh",
    "sampling_options",
    "schedule",
    "source",
    "time_grid",
    "trainer",
]
