"""A run of pictures as an animation."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from diffusion_jax.visual.pixels import replace_file, to_pil


def trajectory_gif(
    path: str | os.PathLike[str],
    frames: Sequence[UInt8[np.ndarray, "height width channels"]],
    *,
    frame_ms: int = 60,
    hold_ms: int = 2000,
    max_frames: int = 60,
) -> Path:
    """Write a GIF that repeats for ever, resting on the last frame.

    Args:
      path: of the file; its folder is made where it is missing.
      frames: uint8 pictures of one size, from noise to data.
      frame_ms: how long each frame stands, in milliseconds.
      hold_ms: how long the last one stands.
      max_frames: of more frames, an even choice with the first and the last is shown.

    Raises:
      ValueError: no frames.
    """
    if len(frames) == 0:
        raise ValueError("frames is empty; expected at least one")
    shown = min(len(frames), max_frames)
    chosen = np.rint(np.linspace(0, len(frames) - 1, shown)).astype(int)
    images = [_quantised(frames[i]) for i in chosen]
    durations = [frame_ms] * (shown - 1) + [hold_ms]

    def write(temporary: Path) -> None:
        images[0].save(
            temporary,
            format="GIF",
            save_all=True,
            append_images=images[1:],
            duration=durations,
            loop=0,
        )

    return replace_file(path, write)


def _quantised(frame: UInt8[np.ndarray, "height width channels"]) -> Image.Image:
    image = to_pil(frame)
    # A palette for each frame: noise and data have few colours in common.
    return image if image.mode == "L" else image.convert("RGB").quantize(256)
