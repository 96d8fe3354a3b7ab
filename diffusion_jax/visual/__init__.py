"""Pictures of samples and curves: grids, trajectories, plots. Only NumPy and Pillow."""

from __future__ import annotations

from diffusion_jax.visual.bits import bit_rows
from diffusion_jax.visual.curves import Bars, Curve, Panel, curve_plot
from diffusion_jax.visual.grid import image_grid
from diffusion_jax.visual.pictures import picture
from diffusion_jax.visual.pixels import save_png, to_uint8
from diffusion_jax.visual.points import point_plot
from diffusion_jax.visual.tokens import token_pictures
from diffusion_jax.visual.trajectory import trajectory_gif

__all__ = [
    "Bars",
    "Curve",
    "Panel",
    "bit_rows",
    "curve_plot",
    "image_grid",
    "picture",
    "point_plot",
    "save_png",
    "to_uint8",
    "token_pictures",
    "trajectory_gif",
]
