"""Train, sample and control diffusion models in JAX, from a laptop to a pod."""

from __future__ import annotations

__version__ = "0.1.0"
