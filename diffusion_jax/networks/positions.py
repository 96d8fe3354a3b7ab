"""Rotary position embedding: queries and keys turned by angles proportional to their position."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion_jax.errors import ConfigError

# Radians a step at the lowest frequency: 1 / base. A grid has tens of steps an axis and text
# hundreds; with 100 for grids (Heo et al. 2024, section 3) no frequency is wasted on them.
GRID_BASE = 100.0
TEXT_BASE = 1e4


def axial_angles(
    grid: Sequence[int], head_dim: int, *, base: float = GRID_BASE, before: int = 0
) -> Float[np.ndarray, "n pairs"]:
    """Angle of every pair of entries of a head at every position of a grid, in radians.

    The pairs are shared out equally over the axes; what does not divide stays unturned. So with two
    axes the products of queries and keys depend on both offsets (axial RoPE: Su et al. 2021 for one
    axis, Heo et al. 2024 for images).

    Args:
        grid: positions along each axis, any number of axes; rows follow it in C order.
        head_dim: size of an attention head.
        base: one over the lowest frequency; the highest is 1 radian a step.
        before: tokens without a position that stand before the grid; they are not turned.
    """
    pairs = head_dim // (2 * len(grid))
    frequencies = base ** (-np.arange(pairs) / pairs)
    coordinates = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1)
    angles = coordinates.reshape(math.prod(grid), len(grid), 1) * frequencies
    table = angles.reshape(math.prod(grid), -1)
    return np.concatenate([np.zeros((before, table.shape[1])), table]).astype(np.float32)


def rotate(
    x: Float[Array, "b n h e"], angles: Float[np.ndarray, "n pairs"]
) -> Float[Array, "b n h e"]:
    """Turns entries i and pairs + i of every head by angle i; entries past 2 pairs stay."""
    pairs = angles.shape[1]
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    wide = x.astype(jnp.float32)
    first, second, rest = wide[..., :pairs], wide[..., pairs : 2 * pairs], wide[..., 2 * pairs :]
    turned = [first * cos - second * sin, first * sin + second * cos, rest]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def check_rotary(field: str, dim: int, heads: int, axes: int) -> None:
    """Raises ConfigError unless a head has a pair of entries for every axis."""
    if dim // heads < 2 * axes:
        raise ConfigError(
            f"{field}={heads}: heads of {dim // heads} entries are too small for rotary positions "
            f"over {axes} axes; at most {max(dim // (2 * axes), 1)} heads, or other positions"
        )
