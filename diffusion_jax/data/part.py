"""Some examples of a source."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from diffusion_jax.data.spec import Batch, DataSpec, Source


@dataclass(frozen=True)
class Part:
    """The examples of `source` at `chosen`, int64 [n], in that order."""

    source: Source
    chosen: Int64[np.ndarray, " n"]

    @property
    def spec(self) -> DataSpec:
        """That of the source."""
        return self.source.spec

    def __len__(self) -> int:
        return len(self.chosen)

    def ids(self, indices: Int64[np.ndarray, " m"]) -> Int64[np.ndarray, " m"]:
        """The ids of the examples at `indices` of the part."""
        return self.source.ids(self.chosen[indices])

    def fetch(
        self,
        indices: Int64[np.ndarray, " m"],
        positions: Int64[np.ndarray, " m"] | None = None,
    ) -> Batch:
        """The examples at `indices` of the part."""
        return self.source.fetch(self.chosen[indices], positions)


def drawn(source: Source, most: int, seed: int = 0) -> Source:
    """`most` examples drawn at random, in their order; all where there are no more."""
    if len(source) <= most:
        return source
    chosen = np.random.default_rng(seed).choice(len(source), most, replace=False, shuffle=False)
    return Part(source, np.sort(chosen).astype(np.int64))
