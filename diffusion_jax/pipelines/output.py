"""Samples as files: `samples.npz`, a grid, one PNG an image, a GIF of the trajectory, texts."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_jax.data.spec import DataSpec
from diffusion_jax.errors import ConfigError, check_local
from diffusion_jax.pipelines.drawing import draw, labelled, write_texts
from diffusion_jax.pipelines.samples import Samples
from diffusion_jax.visual import save_png, token_pictures, trajectory_gif

GRID_LIMIT = 400
"""Images or bits in the grid at most; the files hold all."""


def prepare(out: str | Path) -> Path:
    """Makes the folder, ~ expanded, before any time is spent on sampling.

    Raises:
        ConfigError: it cannot be written.
    """
    check_local("out", out)
    folder = Path(out).expanduser()
    with _reported(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    return folder


@contextlib.contextmanager
def _reported(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        # Pillow's own errors carry no number and no `strerror`.
        raise ConfigError(f"out={folder} cannot be written: {error.strerror or error}") from error


def write(folder: Path, samples: Samples, spec: DataSpec) -> None:
    """Writes all files of a set of samples; to be called by one process alone.

    Raises:
        ConfigError: the disk is full, or takes no files.
    """
    with _reported(folder):
        _write(folder, samples, spec)


def _write(folder: Path, samples: Samples, spec: DataSpec) -> None:
    arrays: dict[str, Any] = samples.arrays()
    np.savez_compressed(folder / "samples.npz", **arrays)
    # Points share one plot; of the others a grid shows what can still be seen.
    limit = None if spec.kind == "points" else GRID_LIMIT
    shown = samples.x[:limit]
    labels = None
    if samples.label is not None and labelled(spec):
        names = spec.classes or tuple(map(str, range(spec.num_classes)))
        labels = [names[i] for i in samples.label[:limit]]
    save_png(folder / "grid.png", draw(shown, spec, labels))
    # Pictures and a trajectory of an earlier call would pass for these samples.
    others = (folder / "trajectory.gif", folder / "samples.txt")
    for old in (*folder.glob("[0-9]" * 5 + ".png"), *others):
        old.unlink(missing_ok=True)
    for number, image in enumerate(_images(samples.x, spec)):
        save_png(folder / f"{number:05d}.png", image)
    if spec.characters:
        write_texts(folder / "samples.txt", samples.x, spec)
    if samples.trajectory is not None:
        frames = [draw(x[:limit], spec) for x in samples.trajectory]
        trajectory_gif(folder / "trajectory.gif", frames)


def _images(x: np.ndarray, spec: DataSpec) -> np.ndarray:
    """uint8 [n, H, W, channels] of what has a file of its own a sample; else none."""
    if spec.kind == "image":
        return x
    if spec.kind == "tokens" and len(spec.shape) == 2:
        return token_pictures(x, spec.vocabulary)
    return x[:0]
