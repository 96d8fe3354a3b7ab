"""Pictures of samples: grids, trajectories, point densities, bits. Only NumPy and Pillow."""

from __future__ import annotations

from diffusion_jax.visual.bits import bit_rows
from diffusion_jax.visual.grid import image_grid
from diffusion_jax.visual.pictures import picture
from diffusion_jax.visual.pixels import save_png, to_uint8
from diffusion_jax.visual.points import point_plot
from diffusion_jax.visual.trajectory import trajectory_gif

__all__ = [
    "bit_rows",
    "image_grid",
    "picture",
    "point_plot",
    "save_png",
    "to_uint8",
    "trajectory_gif",
]
