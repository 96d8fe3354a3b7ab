"""The picture that suits the kind of data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Shaped, UInt8

from diffusion_jax.visual.bits import bit_rows
from diffusion_jax.visual.grid import image_grid
from diffusion_jax.visual.pixels import to_uint8
from diffusion_jax.visual.points import point_plot


def picture(
    x: Shaped[np.ndarray, "n ..."],
    kind: str,
    range: tuple[float, float] = (-1.0, 1.0),
    *,
    labels: Sequence[str] | None = None,
) -> UInt8[np.ndarray, "height width channels"]:
    """Draw samples of a kind of data.

    Args:
      x: [n, H, W, C] images, uint8 or values in [-1, 1]; [n, 2] points; or [n, length] bits.
      kind: "image", "points" or "bits".
      range: (low, high) of the axes; only points read it.
      labels: one text under each image; only images take them.

    Raises:
      ValueError: another kind, or labels for what is not an image.
    """
    if kind == "image":
        return image_grid(x if x.dtype == np.uint8 else to_uint8(x), labels=labels)
    if labels is not None:
        raise ValueError(f"labels: only images take them, not {kind}")
    if kind == "points":
        return point_plot(x, range)
    if kind == "bits":
        return bit_rows(x)
    raise ValueError(f"kind={kind!r} is unknown; known: bits, image, points")
