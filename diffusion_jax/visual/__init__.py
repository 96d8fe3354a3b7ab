"""Pictures of samples: grids, trajectories, point densities, bits. Only NumPy and Pillow."""

from __future__ import annotations

from diffusion_jax.visual.grid import image_grid
from diffusion_jax.visual.pixels import save_png, to_uint8

__all__ = ["image_grid", "save_png", "to_uint8"]
