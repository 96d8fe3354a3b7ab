"""Samples as files: `samples.npz`, a grid, one PNG an image, a GIF of the trajectory."""

from __future__ import annotations

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
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"out={folder} cannot be written: {error.strerror}") from None
    return folder


def write(folder: Path, samples: Samples, spec: DataSpec) -> None:
    """Writes all files of a set of samples."""
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
