"""Points in the plane as a picture: overlapping discs that darken where points are dense."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

_INK = np.array([25.0, 60.0, 130.0])
_FRAME = (150, 150, 150)
_TEXT = (90, 90, 90)
_MARGIN = 16


def point_plot(
    points: Float[np.ndarray, "n 2"],
    range: tuple[float, float] = (-2.0, 2.0),
    *,
    size: int = 360,
) -> UInt8[np.ndarray, "side side 3"]:
    """Draw points on square axes; x to the right, y upwards.

    Args:
      points: [n, 2]; those outside the range, or not finite, are not drawn.
      range: (low, high) of both axes.
      size: side of the plot in pixels, without its margin.

    Returns:
      uint8 RGB with a frame and the two ends of the axes.

    Raises:
      ValueError: the range is empty.
    """
    low, high = range
    if not low < high:
        raise ValueError(f"range={range}: expected low < high")
    scaled = (np.asarray(points, np.float64) - low) / (high - low) * size
    inside = (scaled >= 0.0) & (scaled < size)  # False for NaN
    pixels = np.floor(scaled[inside.all(axis=1)]).astype(np.int64)
    count = len(points)
    discs = _disc_counts(pixels, size, radius=3 if count <= 500 else 2 if count <= 5000 else 1)
    # One disc of few is nearly opaque; of many, only their overlap is.
    opacity = 1.0 - np.exp(-discs * np.clip(4000.0 / max(count, 1), 0.1, 1.5))
    canvas = 255.0 + opacity[::-1, :, None] * (_INK - 255.0)
    return _with_axes(np.rint(canvas).astype(np.uint8), low, high)


def _disc_counts(pixels: np.ndarray, size: int, radius: int) -> Float[np.ndarray, "size size"]:
    """How many discs cover each pixel, [row = y, column = x]."""
    counts = np.zeros((size + 2 * radius, size + 2 * radius))
    offsets = np.arange(-radius, radius + 1)
    for dy in offsets:
        for dx in offsets:
            if dy * dy + dx * dx <= (radius + 0.3) ** 2:  # without the tips of a cross
                rows, columns = pixels[:, 1] + dy + radius, pixels[:, 0] + dx + radius
                np.add.at(counts, (rows, columns), 1.0)
    return counts[radius : radius + size, radius : radius + size]


def _with_axes(
    plot: UInt8[np.ndarray, "size size 3"], low: float, high: float
) -> UInt8[np.ndarray, "side side 3"]:
    size = len(plot)
    side = size + 2 * _MARGIN
    picture = Image.new("RGB", (side, side), "white")
    picture.paste(Image.fromarray(plot), (_MARGIN, _MARGIN))
    draw = ImageDraw.Draw(picture)
    end = _MARGIN + size
    draw.rectangle((_MARGIN - 1, _MARGIN - 1, end, end), outline=_FRAME)
    font = ImageFont.load_default(9)
    for value, place in ((low, _MARGIN), (high, end)):
        text = f"{value:g}"
        draw.text((place, end + 2), text, fill=_TEXT, font=font, anchor="ma")
        draw.text((_MARGIN - 3, side - place), text, fill=_TEXT, font=font, anchor="rm")
    return np.asarray(picture)
