"""Distributions in the plane, computed where they are asked for.

Example i of seed s is a pure function of (s, i): the same point on every machine, in any order,
with no array kept. Their scale is near 1, so that they meet the noise as images in [-1, 1] do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int32, Int64

from diffusion_jax.data.hashing import mix, normal, uniform
from diffusion_jax.data.spec import Batch, DataSpec, Split
from diffusion_jax.errors import ConfigError, unknown_name

Indices = Int64[np.ndarray, " n"]
Points = tuple[Float64[np.ndarray, "n 2"], Int32[np.ndarray, " n"] | None]

# Independent draws of one example are told apart by these words.
_FIRST, _SECOND, _NOISE_X, _NOISE_Y, _CLASS = range(5)


def _isotropic(seed: int, indices: Indices, scale: float) -> Float64[np.ndarray, "n 2"]:
    noise = [normal(seed, indices, draw) for draw in (_NOISE_X, _NOISE_Y)]
    return scale * np.stack(noise, axis=-1)


def _choose(seed: int, indices: Indices, count: int) -> Int32[np.ndarray, " n"]:
    # The remainder's bias is count / 2^64.
    return (mix(seed, indices, _CLASS) % np.uint64(count)).astype(np.int32)


def swiss_roll(seed: int, indices: Indices) -> Points:
    """theta = 1.5 pi (1 + 2u), x = theta (cos, sin) / 10 + .05 noise (Sohl-Dickstein et al., 2015,
    section 3.1)."""
    theta = 1.5 * np.pi * (1.0 + 2.0 * uniform(seed, indices, _FIRST))
    curve = theta[:, None] * np.stack([np.cos(theta), np.sin(theta)], axis=-1) / 10.0
    return curve + _isotropic(seed, indices, 0.05), None


def moons(seed: int, indices: Indices) -> Points:
    """Two interleaved half circles of radius .8; the label says which."""
    label = _choose(seed, indices, 2)
    angle = np.pi * uniform(seed, indices, _FIRST)
    side = 1.0 - 2.0 * label
    centre = np.stack([-0.4 * side, -0.2 * side], axis=-1)
    curve = 0.8 * np.stack([np.cos(angle), np.sin(angle) * side], axis=-1)
    return centre + curve + _isotropic(seed, indices, 0.05), label


def checkerboard(seed: int, indices: Indices) -> Points:
    """Uniform on the eight dark fields of a 4 x 4 board over [-1.6, 1.6]^2."""
    field = _choose(seed, indices, 8)
    row = field // 2
    column = 2 * (field % 2) + row % 2
    inside = [uniform(seed, indices, draw) for draw in (_FIRST, _SECOND)]
    return 0.8 * np.stack([column + inside[0], row + inside[1]], axis=-1) - 1.6, None


def gaussian_mixture(seed: int, indices: Indices) -> Points:
    """Eight Gaussians of standard deviation .12 on a circle of radius 1.2; the label says which."""
    label = _choose(seed, indices, 8)
    angle = 2.0 * np.pi * label / 8.0
    centre = 1.2 * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    return centre + _isotropic(seed, indices, 0.12), label


def spiral(seed: int, indices: Indices) -> Points:
    """Three arms of a spiral that turns by 1.5 pi from the centre out; the label is the arm."""
    label = _choose(seed, indices, 3)
    along = np.sqrt(uniform(seed, indices, _FIRST))
    angle = 1.5 * np.pi * along + 2.0 * np.pi * label / 3.0
    curve = 1.5 * along[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    return curve + _isotropic(seed, indices, 0.04), label


DISTRIBUTIONS: dict[str, tuple[Callable[[int, Indices], Points], int]] = {
    "swiss_roll": (swiss_roll, 0),
    "moons": (moons, 2),
    "checkerboard": (checkerboard, 0),
    "gaussian_mixture": (gaussian_mixture, 8),
    "spiral": (spiral, 3),
}
"""Name -> (function of (seed, indices), number of classes)."""


@dataclass(frozen=True, kw_only=True)
class PointSource:
    """A finite stretch of the endless sequence of points; the id is the place in that sequence."""

    spec: DataSpec
    draw: Callable[[int, Indices], Points]
    seed: int
    first: int
    size: int

    def __len__(self) -> int:
        return self.size

    def ids(self, indices: Indices) -> Indices:
        """The ids of the examples at `indices`."""
        return indices + self.first

    def fetch(self, indices: Indices, positions: Indices | None = None) -> Batch:
        """Compute the points at `indices`; positions change nothing here."""
        ids = self.ids(indices)
        x, label = self.draw(self.seed, ids)
        conditioning = {} if label is None else {"label": label}
        return {"x": x.astype(np.float32), "conditioning": conditioning, "id": ids}


def points(
    split: Split,
    *,
    distribution: str = "swiss_roll",
    seed: int = 0,
    size: int = 100_000,
    held_out: int = 10_000,
) -> PointSource:
    """Points [n, 2] of a named distribution.

    Args:
      split: train takes ids 0..size-1, validation the next `held_out`.
      distribution: one of `DISTRIBUTIONS`.
      seed: of the data, apart from the seed of a run.
      size: number of training points.
      held_out: number of validation points.

    Raises:
      ConfigError: unknown distribution, or an empty split.
    """
    if distribution not in DISTRIBUTIONS:
        raise ConfigError(unknown_name("data.points.distribution", distribution, DISTRIBUTIONS))
    draw, num_classes = DISTRIBUTIONS[distribution]
    first, count = (0, size) if split == "train" else (size, held_out)
    field = "size" if split == "train" else "held_out"
    if count < 1:
        raise ConfigError(f"data.points.{field}={count}: expected at least 1")
    spec = DataSpec(shape=(2,), kind="points", num_classes=num_classes, range=(-2.0, 2.0))
    return PointSource(spec=spec, draw=draw, seed=seed, first=first, size=count)
