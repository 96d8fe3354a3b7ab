"""Noising processes: what turns data into noise, and what a model has to undo."""

from __future__ import annotations

from diffusion_jax.diffusion.processes.binomial import Binomial
from diffusion_jax.diffusion.processes.gaussian import Gaussian
from diffusion_jax.diffusion.processes.protocol import (
    Bernoulli,
    Distribution,
    Normal,
    Process,
)

__all__ = ["Bernoulli", "Binomial", "Distribution", "Gaussian", "Normal", "Process"]
