"""Binary sequences as a picture."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Shaped, UInt8

from diffusion_jax.visual.grid import image_grid

_CELL = 8
_PADDING = 2


def bit_rows(
    bits: Shaped[np.ndarray, "n length"], *, columns: int | None = None
) -> UInt8[np.ndarray, "height width 1"]:
    """One sequence a row, dark where the bit is 1.

    Args:
      bits: [n, length] in [0, 1]; probabilities come out grey.
      columns: of sequences side by side; by default the picture is about square.

    Returns:
      uint8 [H, W, 1].
    """
    rows = np.rint(255.0 * (1.0 - np.clip(np.asarray(bits, np.float64), 0.0, 1.0)))
    count, length = rows.shape
    if columns is None:
        aspect = (_CELL + _PADDING) / (length * _CELL + _PADDING)
        columns = max(1, round(math.sqrt(count * aspect)))
    cells = rows.astype(np.uint8)[:, None, :, None]
    return image_grid(cells, columns=columns, scale=_CELL, padding=_PADDING, background=128)
