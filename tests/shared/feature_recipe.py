"""Weights and pictures from a seed: the same here and under `benchmarks/feature_references.py`.

NumPy alone: the script runs where PyTorch is and the package is not.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping

import numpy as np


def weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """A tensor for each name, so that features neither vanish nor grow through the layers."""
    return {name: _tensor(name, shape) for name, shape in shapes.items()}


def _tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    draw = np.random.default_rng(zlib.crc32(name.encode())).random(shape, dtype=np.float32)
    if name.endswith("running_var"):
        return np.float32(0.5) + draw
    if len(shape) == 1:
        # Scales about 1, offsets and means about 0.
        return np.float32(0.4) * draw + np.float32(0.8 if name.endswith("weight") else -0.2)
    bound = np.sqrt(np.float32(6 / np.prod(shape[1:])))
    return bound * (2 * draw - 1)


def picture(height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3]: smooth colours with noise and a sharp-edged square."""
    rng = np.random.default_rng(height * 1000 + width)
    y, x = np.mgrid[:height, :width].astype(np.float64)
    wave = np.sin(2 * np.pi * (3 * x / width + 2 * y / height))
    colours = np.stack([120 + 90 * wave, 255 * y / height, 255 * x / width], -1)
    noisy = colours + 60 * (rng.random((height, width, 3)) - 0.5)
    noisy[height // 4 : height // 2, width // 3 : width // 2] = (250, 10, 128)
    return np.clip(np.round(noisy), 0, 255).astype(np.uint8)


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """Tells whether both sides made the same arrays."""
    found = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        found.update(f"{name} {array.shape} {array.dtype}\n".encode() + array.tobytes())
    return found.hexdigest()[:16]
