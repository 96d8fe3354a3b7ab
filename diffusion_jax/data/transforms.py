"""Random changes of images on the way into a batch: windows and flips.

The draws are hashes of the example's id and its position in the run, so that a resumed run repeats
them, other epochs and other seeds (which bring another id to a position) do not, and they are the
same on any number of processes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64

from diffusion_jax.data.hashing import mix, uniform
from diffusion_jax.data.spec import Batch, DataSpec, Source

# The streams of draws that decide flips and windows; another augmentation takes another number.
_FLIP = 1
_CROP = 2


def mirrored(
    ids: Int64[np.ndarray, " n"], positions: Int64[np.ndarray, " n"]
) -> Bool[np.ndarray, " n"]:
    """Which examples are shown mirrored: each with probability 1/2, by its id and position."""
    return (mix(_FLIP, ids, positions) & np.uint64(1)).astype(bool)


def windows(
    ids: Int64[np.ndarray, " n"],
    positions: Int64[np.ndarray, " n"] | None,
    spare: Int64[np.ndarray, "n 2"],
) -> Int64[np.ndarray, "n 2"]:
    """Top left corners (row, column) of random windows, uniform in 0..spare, ends included.

    Args:
      ids: of the examples.
      positions: where in the run each stands; None takes the middle.
      spare: by how many pixels each picture is higher and wider than the window.
    """
    if positions is None:
        return spare // 2
    draws = np.stack([uniform(_CROP, axis, ids, positions) for axis in (0, 1)], axis=-1)
    return (draws * (spare + 1)).astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class HorizontalFlip:
    """A source whose images are mirrored with probability 1/2; without positions none is."""

    source: Source

    @property
    def spec(self) -> DataSpec:
        """As of the wrapped source."""
        return self.source.spec

    def __len__(self) -> int:
        return len(self.source)

    def ids(self, indices: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """As of the wrapped source."""
        return self.source.ids(indices)

    def fetch(
        self,
        indices: Int64[np.ndarray, " n"],
        positions: Int64[np.ndarray, " n"] | None = None,
    ) -> Batch:
        """The examples at `indices`, some of them mirrored left to right."""
        batch = self.source.fetch(indices, positions)
        if positions is None:
            return batch
        flip = mirrored(batch["id"], positions)
        # A source gives arrays that are the caller's own.
        batch["x"][flip] = batch["x"][flip][:, :, ::-1]
        return batch
