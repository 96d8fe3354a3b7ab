"""Pictures of a run in progress: a grid at intervals, a trajectory at the end, always one seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from diffusion_jax.pipelines.drawing import draw, write_texts
from diffusion_jax.pipelines.pixel import PixelPipeline
from diffusion_jax.visual import save_png, trajectory_gif


@dataclasses.dataclass(frozen=True, kw_only=True)
class Previews:
    """Draws the same samples from the weights of the moment.

    Attributes:
        num: samples in the grid.
        seed: of the samples; fixed, so that grids of different steps compare.
        folder: where `<step>.png` goes, and of texts `<step>.txt`.
        trajectory: file of the GIF, written after the last step.
        prompts: captions of the samples, None where the model reads none.
        scalars: numbers of the samples, None where the model reads none.
        last_step: number of the last step.
        write: whether this process writes.
        show: `(step, name, image)`, for TensorBoard.
    """

    num: int
    seed: int
    folder: Path
    trajectory: Path
    last_step: int
    prompts: Sequence[str] | None = None
    scalars: np.ndarray | None = None
    write: bool
    show: Callable[[int, str, np.ndarray], None]

    def __call__(self, pipeline: PixelPipeline, step: int) -> Mapping[str, float]:
        """Samples on all processes; process 0 draws."""
        last = step == self.last_step
        given = {"prompts": self.prompts, "scalars": self.scalars}
        samples = pipeline.sample(self.num, **given, seed=self.seed, trajectory=last)
        if not self.write:
            return {}
        image = draw(samples.x, pipeline.spec)
        save_png(self.folder / f"{step:08d}.png", image)
        self.show(step, "samples", image)
        if pipeline.spec.characters:
            write_texts(self.folder / f"{step:08d}.txt", samples.x, pipeline.spec)
        if samples.trajectory is not None:
            frames = [draw(states, pipeline.spec) for states in samples.trajectory]
            trajectory_gif(self.trajectory, frames)
        return {}
