"""Examples that lie decoded in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float32, Int32, Int64, Shaped, UInt8

from diffusion_jax.data.spec import Batch, DataSpec


def from_uint8(pixels: UInt8[np.ndarray, " *shape"]) -> Float32[np.ndarray, " *shape"]:
    """uint8 pixels 0..255 as float32 in [-1, 1]: value / 127.5 - 1."""
    values = pixels.astype(np.float32)
    values /= np.float32(127.5)
    values -= np.float32(1.0)
    return values


def gathered(
    conditioning: Mapping[str, Shaped[np.ndarray, "n ..."]], indices: Int64[np.ndarray, " m"]
) -> dict[str, Shaped[np.ndarray, "m ..."]]:
    """The entries at `indices`, integers as int32."""
    rows = {name: values[indices] for name, values in conditioning.items()}
    return {
        name: values if values.dtype == np.float32 else values.astype(np.int32)
        for name, values in rows.items()
    }


@dataclass(frozen=True, kw_only=True)
class ArraySource:
    """A source over arrays; uint8 pixels stay uint8 and are converted a batch at a time.

    Attributes:
      spec: of the examples.
      x: uint8 pixels, float32 values or int32 tokens [n, *spec.shape].
      example_ids: int64 [n].
      shown_ids: int64 [n], of what stands at each place, where that may be another example because
        its own cannot be read; None where each stands at its own.
      labels: int32 [n], or None.
      conditioning: further entries of a batch's conditioning, of all n examples; integers may be
        held in fewer bits than the int32 that a batch has.
    """

    spec: DataSpec
    x: Shaped[np.ndarray, "n ..."]
    example_ids: Int64[np.ndarray, " n"]
    shown_ids: Int64[np.ndarray, " n"] | None = None
    labels: Int32[np.ndarray, " n"] | None = None
    conditioning: Mapping[str, Shaped[np.ndarray, "n ..."]] = field(default_factory=dict)

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
        conditioning |= gathered(self.conditioning, indices)
        return {
            "x": from_uint8(x) if x.dtype == np.uint8 else x,
            "conditioning": conditioning,
            "id": (self.example_ids if self.shown_ids is None else self.shown_ids)[indices],
        }
