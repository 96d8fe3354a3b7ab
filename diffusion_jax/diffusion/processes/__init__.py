"""Noising processes: what turns data into noise, and what a model has to undo."""

from __future__ import annotations

from diffusion_jax.diffusion.processes.binomial import Binomial
from diffusion_jax.diffusion.processes.categorical import Categorical, TokenProcess
from diffusion_jax.diffusion.processes.gaussian import Gaussian
from diffusion_jax.diffusion.processes.keeping import KEEPS, CosineKeep, Keep, LinearKeep
from diffusion_jax.diffusion.processes.learned_keep import LearnedKeep, learned_keep
from diffusion_jax.diffusion.processes.masked import Masked
from diffusion_jax.diffusion.processes.protocol import (
    Bernoulli,
    Discrete,
    Distribution,
    Normal,
    Process,
)
from diffusion_jax.diffusion.processes.reverse import (
    LearnedGaussian,
    Modelled,
    with_fraction,
    with_kernels,
)
from diffusion_jax.diffusion.processes.uniform import Uniform

__all__ = [
    "KEEPS",
    "Bernoulli",
    "Binomial",
    "Categorical",
    "CosineKeep",
    "Discrete",
    "Distribution",
    "Gaussian",
    "Keep",
    "LearnedGaussian",
    "LearnedKeep",
    "LinearKeep",
    "Masked",
    "Modelled",
    "Normal",
    "Process",
    "TokenProcess",
    "Uniform",
    "learned_keep",
    "with_fraction",
    "with_kernels",
]
