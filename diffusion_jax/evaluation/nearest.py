"""Are samples copies? Their nearest training examples, as a share and as a sheet of pictures."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffusion_jax import data
from diffusion_jax.evaluation.collected import Collected
from diffusion_jax.evaluation.features.extract import Extractor
from diffusion_jax.evaluation.metrics import Score, full_name
from diffusion_jax.evaluation.neighbours import COPY_RATIO, Nearest, NearestStream, memorisation
from diffusion_jax.evaluation.references import pictures
from diffusion_jax.visual.grid import image_grid
from diffusion_jax.visual.pixels import save_png, to_uint8

LOOKED_AT = 512
"""Samples whose pictures are kept, for the sheet."""
SHOWN = 16


class Neighbours:
    """Collects the pictures of the first samples, and finds their neighbours in the end.

    Attributes:
        feature_seconds: that reading the training examples and their features took.
    """

    def __init__(self, expected: int) -> None:
        self.feature_seconds = 0.0
        self._pixels: dict[int, np.ndarray] = {}
        self._seen = 0
        self._limit = min(LOOKED_AT, expected)

    def see(self, pixels: np.ndarray, finite: np.ndarray | None) -> None:
        """Takes the next samples."""
        for place in range(self._seen, min(self._seen + len(pixels), self._limit)):
            if finite is None or finite[place - self._seen]:
                self._pixels[place] = pixels[place - self._seen]
        self._seen += len(pixels)

    def score(
        self,
        collected: Collected,
        training: data.Source,
        extractor: Extractor,
        folder: Path,
        step: int,
        watch: Callable[[], None] = lambda: None,
    ) -> Score:
        """The memorisation rate; writes the sheet `nearest_STEP.png`: pairs of a sample and, to its
        right, the nearest training example, the most alike first. `watch` is called now and then,
        and may raise."""
        places, features = collected.in_order()
        found = self._search(features, training, extractor, watch)
        rows = [row for row, place in enumerate(places) if int(place) in self._pixels]
        rows = sorted(rows, key=lambda row: found.ratio[row])[:SHOWN]
        if jax.process_index() == 0:
            near = to_uint8(training.fetch(found.index[rows])["x"])
            pairs: list[Any] = []
            for row, neighbour in zip(rows, near, strict=True):
                pairs += [self._pixels[int(places[row])], neighbour]
            save_png(folder / f"nearest_{step:08d}.png", image_grid(np.stack(pairs), columns=8))
        rate = memorisation(found)
        remark = f"nearer than {COPY_RATIO:.2g} of the next nearest, of {len(training)}"
        name = full_name("memorisation", extractor.network.score)
        return Score(name=name, estimate=rate, remark=remark, metric="nearest")

    def _search(
        self,
        features: np.ndarray,
        training: data.Source,
        extractor: Extractor,
        watch: Callable[[], None],
    ) -> Nearest:
        stream, began = NearestStream(features), time.perf_counter()
        for pixels, _ in pictures(training):
            known = extractor(pixels)["features"]
            self.feature_seconds += time.perf_counter() - began
            stream.add(known)
            watch()
            began = time.perf_counter()
        return stream.result()
