"""Tokens as a picture: binary and grey pictures, texts, rows of cells."""

from __future__ import annotations

import functools

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image, ImageDraw, ImageFont

from diffusion_jax.visual.grid import image_grid

_COLUMNS = 64
_CELL = 8
_LINE = 14
_GAP = 6
_SHADE = 215


def token_pictures(
    x: Int[np.ndarray, "n height width"], vocabulary: int
) -> UInt8[np.ndarray, "n height width 3"]:
    """Tokens laid out in two dimensions as grey levels, black to white; masks are blue.

    Args:
      x: tokens 0..vocabulary - 1; what lies beyond is a mask.
      vocabulary: at least 2.
    """
    levels = np.rint(np.arange(vocabulary) * (255.0 / (vocabulary - 1)))
    grey = np.repeat(levels[:, None], 3, axis=1)
    palette = np.concatenate([grey, [[70.0, 110.0, 170.0]]]).astype(np.uint8)
    return palette[np.minimum(x, vocabulary)]


def token_rows(
    x: Int[np.ndarray, "n length"], vocabulary: int
) -> UInt8[np.ndarray, "height width 3"]:
    """One sequence a row of cells, in the colours of `token_pictures`."""
    return image_grid(token_pictures(x[:, None], vocabulary), columns=1, scale=_CELL, padding=2)


def text_picture(
    x: Int[np.ndarray, "n length"], characters: str
) -> UInt8[np.ndarray, "height width 1"]:
    """Sequences as texts in cells of one size, 64 to a line; masks are shaded cells.

    Args:
      x: tokens, of which i stands for characters[i]; what lies beyond is a mask.
      characters: of the vocabulary. Those that are no printable ASCII are drawn as a dot.

    Returns:
      uint8 [H, W, 1].
    """
    count, length = x.shape
    columns = min(length, _COLUMNS)
    lines = -(-length // columns)
    height = count * (lines * _LINE + _GAP) + _GAP
    canvas = np.full((height, columns * _CELL + 2 * _GAP), 255, np.uint8)
    for number, row in enumerate(x):
        top = _GAP + number * (lines * _LINE + _GAP)
        for place, token in enumerate(row):
            y, left = top + place // columns * _LINE, _GAP + place % columns * _CELL
            mask = token >= len(characters)
            cell = _shade() if mask else _glyph(characters[token])
            canvas[y : y + _LINE, left : left + _CELL] = cell
    return canvas[..., None]


@functools.cache
def _glyph(character: str) -> UInt8[np.ndarray, "line cell"]:
    shown = character if character.isascii() and character.isprintable() else "."
    cell = Image.new("L", (_CELL, _LINE), 255)
    font = ImageFont.load_default(12)
    ImageDraw.Draw(cell).text((_CELL // 2, _LINE - 4), shown, fill=30, font=font, anchor="ms")
    return np.asarray(cell)


@functools.cache
def _shade() -> UInt8[np.ndarray, "line cell"]:
    cell = np.full((_LINE, _CELL), 255, np.uint8)
    cell[2:-2, 1:-1] = _SHADE
    return cell
