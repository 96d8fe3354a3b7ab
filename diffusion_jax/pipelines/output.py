"""Samples as files: `samples.npz`, a grid, one PNG an image, a GIF of the trajectory."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from diffusion_jax.data.spec import DataSpec
from diffusion_jax.errors import ConfigError, check_local
from diffusion_jax.pipelines.samples import Samples
from diffusion_jax.visual import picture, save_png, trajectory_gif

GRID_LIMIT = 400
"""Samples in the grid at most; the files hold all."""


def prepare(out: str | Path) -> Path:
    """Makes the folder before any time is spent on sampling.

    Raises:
        ConfigError: it cannot be written.
    """
    check_local("out", out)
    folder = Path(out)
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
    np.savez_compressed(folder / "samples.npz", allow_pickle=False, **samples.arrays())
    shown = samples.x[:GRID_LIMIT]
    labels = None
    if samples.label is not None and spec.kind == "image":
        names = spec.classes or tuple(map(str, range(spec.num_classes)))
        labels = [names[i] for i in samples.label[:GRID_LIMIT]]
    save_png(folder / "grid.png", picture(shown, spec.kind, spec.range, labels=labels))
    if spec.kind == "image":
        for number, image in enumerate(samples.x):
            save_png(folder / f"{number:05d}.png", image)
    if samples.trajectory is not None:
        frames = [picture(x[:GRID_LIMIT], spec.kind, spec.range) for x in samples.trajectory]
        trajectory_gif(folder / "trajectory.gif", frames)
