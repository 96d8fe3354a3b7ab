"""Values in [-1, 1] to pixels, and pixels to files."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image


def to_uint8(x: Float[np.ndarray, " *shape"]) -> UInt8[np.ndarray, " *shape"]:
    """Pixels of values in [-1, 1]: clip(round((x + 1) * 127.5), 0, 255).

    It rounds to the nearest integer (half to even), the inverse of value / 127.5 - 1: all 256
    pixel values survive the round trip. Truncating instead darkens by half a level, which is
    enough to shift an FID. NaN becomes 0.

    Args:
      x: values of any shape; those outside [-1, 1] are clipped.

    Returns:
      uint8 array of the same shape.
    """
    levels = np.rint((np.asarray(x, np.float64) + 1.0) * 127.5)
    return np.nan_to_num(np.clip(levels, 0.0, 255.0), nan=0.0).astype(np.uint8)


def to_pil(image: UInt8[np.ndarray, "height width channels"]) -> Image.Image:
    """A Pillow image of one, three or four channels."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def save_png(
    path: str | os.PathLike[str], image: UInt8[np.ndarray, "height width channels"]
) -> Path:
    """Write one image; its folder is made where it is missing."""
    return replace_file(path, lambda temporary: to_pil(image).save(temporary, format="PNG"))


def replace_file(path: str | os.PathLike[str], write: Callable[[Path], None]) -> Path:
    """Let `write` make a file and then give it its name, so that nobody ever reads half of it.

    Of several that write it at once, on this or other machines, one is last.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
