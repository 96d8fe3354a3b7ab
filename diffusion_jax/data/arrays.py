"""Examples that lie decoded in memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int32, Int64, Shaped, UInt8

from diffusion_jax.data.spec import Batch, DataSpec


def from_uint8(pixels: UInt8[np.ndarray, " *shape"]) -> Float32[np.ndarray, " *shape"]:
    """uint8 pixels 0..255 as float32 in [-1, 1]: value / 127.5 - 1."""
    values = pixels.astype(np.float32)
    values /= np.float32(127.5)
    values -= np.float32(1.0)
    return values


@dataclass(frozen=True, kw_only=True)
class ArraySource:
    """A source over arrays; uint8 pixels stay uint8 and are converted a batch at a time.

    Attributes:
      spec: of the examples.
      x: uint8 pixels or float32 values [n, *spec.shape].
      example_ids: int64 [n].
      labels: int32 [n], or None.
    """

    spec: DataSpec
    x: Shaped[np.ndarray, "n ..."]
    example_ids: Int64[np.ndarray, " n"]
    labels: Int32[np.ndarray, " n"] | None = None

    def __len__(self) -> int:
        return len(self.x)

    def ids(self, indices: Int64[np.ndarray, " m"]) -> Int64[np.ndarray, " m"]:
        """The ids of the examples at `indices`."""
        return self.example_ids[indices]

    def fetch(
        self,
        indices: Int64[np.ndarray, " m"],
        positions: Int64[np.ndarray, " m"] | None = None,
    ) -> Batch:
        """Gather the examples at `indices`; positions change nothing here."""
        x = self.x[indices]
        conditioning = {} if self.labels is None else {"label": self.labels[indices]}
        return {
            "x": from_uint8(x) if x.dtype == np.uint8 else x,
            "conditioning": conditioning,
            "id": self.example_ids[indices],
        }
