"""The mathematics of diffusion: pure functions on arrays, in NumPy or JAX."""

from __future__ import annotations
