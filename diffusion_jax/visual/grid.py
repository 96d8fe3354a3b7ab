"""Many images as one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from diffusion_jax.visual.pixels import to_pil

_LABEL_HEIGHT = 14


def upscale_factor(height: int, width: int, target: int = 64) -> int:
    """The whole factor that brings the longer side of a tiny image nearest below `target`."""
    return max(1, target // max(height, width))


def _composite(
    images: UInt8[np.ndarray, "n h w c"], background: int
) -> UInt8[np.ndarray, "n h w d"]:
    """RGBA over a grey background; one and three channels pass."""
    if images.shape[-1] in (1, 3):
        return images
    if images.shape[-1] != 4:
        raise ValueError(f"images have {images.shape[-1]} channels; expected 1, 3 or 4")
    alpha = images[..., 3:].astype(np.float64) / 255.0
    over = images[..., :3] * alpha + background * (1.0 - alpha)
    return np.rint(over).astype(np.uint8)


def image_grid(
    images: UInt8[np.ndarray, "n height width channels"],
    *,
    columns: int | None = None,
    labels: Sequence[str] | None = None,
    scale: int | None = None,
    padding: int = 2,
    background: int = 255,
) -> UInt8[np.ndarray, "grid_height grid_width grid_channels"]:
    """Lay images out in rows, left to right, top to bottom, on a plain background.

    Args:
      images: uint8 with 1 channel (grey), 3 (RGB) or 4 (RGBA, composited over the background).
      columns: images in a row; by default the grid is as square as it can be.
      labels: one text under each image, drawn in Pillow's built-in font.
      scale: whole factor of nearest-neighbour enlargement; by default tiny images grow to about
        64 pixels and others keep their size.
      padding: pixels around and between the images.
      background: grey level of the padding.

    Returns:
      uint8 [H, W, 1 or 3]; with labels, always 3 channels.

    Raises:
      ValueError: no images, another number of channels, or of labels than images.
    """
    if len(images) == 0:
        raise ValueError("images is empty; expected at least one")
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"labels has {len(labels)} entries; expected {len(images)}, one an image")
    images = _composite(images, background)
    count, height, width, channels = images.shape
    if scale is None:
        scale = upscale_factor(height, width)
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    rows = math.ceil(count / columns)

    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    height, width = images.shape[1:3]
    cell_height = height + padding + (_LABEL_HEIGHT if labels is not None else 0)
    cell_width = width + padding
    canvas = np.full(
        (padding + rows * cell_height, padding + columns * cell_width, channels),
        background,
        np.uint8,
    )
    corners = [
        (padding + (i // columns) * cell_height, padding + (i % columns) * cell_width)
        for i in range(count)
    ]
    for image, (top, left) in zip(images, corners, strict=True):
        canvas[top : top + height, left : left + width] = image
    if labels is None:
        return canvas
    places = [(left + width // 2, top + height + 1) for top, left in corners]
    return _write_labels(canvas, labels, places, width)


def _write_labels(
    canvas: UInt8[np.ndarray, "h w c"],
    labels: Sequence[str],
    places: Sequence[tuple[int, int]],
    width: int,
) -> UInt8[np.ndarray, "h w 3"]:
    picture: Image.Image = to_pil(canvas).convert("RGB")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(10)
    for label, place in zip(labels, places, strict=True):
        while len(label) > 1 and draw.textlength(label, font=font) > width:
            label = label.removesuffix("…")[:-1] + "…" if len(label) > 2 else label[:1]
        draw.text(place, label, fill=(60, 60, 60), font=font, anchor="ma")
    return np.asarray(picture)
