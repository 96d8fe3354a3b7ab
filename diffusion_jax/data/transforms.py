"""Changes of images: size on the way into memory, flips on the way into a batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64
from PIL import Image, ImageOps

from diffusion_jax.data.hashing import mix
from diffusion_jax.data.spec import Batch, DataSpec, Source

# The stream of draws that decide flips; another augmentation takes another number.
_FLIP = 1


def resize(image: Image.Image, size: int) -> Image.Image:
    """A centred square of `size` x `size` pixels, resampled with antialiasing (Lanczos)."""
    return ImageOps.fit(image, (size, size), method=Image.Resampling.LANCZOS)


@dataclass(frozen=True, kw_only=True)
class HorizontalFlip:
    """A source whose images are mirrored with probability 1/2.

    The draw is a hash of the example's id and its position in the run, so that a resumed run
    repeats it, other epochs and other seeds (which bring another id to a position) do not, and it
    is the same on any number of processes. Without positions nothing is flipped.
    """

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
        flip = (mix(_FLIP, batch["id"], positions) & np.uint64(1)).astype(bool)
        x = np.where(flip[:, None, None, None], batch["x"][:, :, ::-1], batch["x"])
        return {**batch, "x": x}
