"""Several sources one after the other, such as both splits of a folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int64

from diffusion_jax.data.spec import Batch, DataSpec, Source


@dataclasses.dataclass(frozen=True)
class Joined:
    """The examples of `parts` in turn; all have one spec."""

    parts: Sequence[Source]

    @property
    def spec(self) -> DataSpec:
        """That of the parts."""
        return self.parts[0].spec

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def ids(self, indices: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """See `Source`."""
        return self._gathered(indices, lambda part, own, _: part.ids(own))

    def fetch(
        self,
        indices: Int64[np.ndarray, " n"],
        positions: Int64[np.ndarray, " n"] | None = None,
    ) -> Batch:
        """See `Source`."""

        def fetch(part: Source, own: Any, rows: Any) -> Batch:
            return part.fetch(own, None if positions is None else positions[rows])

        return self._gathered(indices, fetch)

    def _gathered(self, indices: Any, read: Callable[[Source, Any, Any], Any]) -> Any:
        """What `read` gives of each part's own examples and their rows, put in order."""
        starts = np.cumsum([0, *map(len, self.parts)])
        of_part = np.searchsorted(starts, indices, side="right") - 1
        found, order = [], []
        for number in np.unique(of_part):
            rows = np.flatnonzero(of_part == number)
            own = np.asarray(indices)[rows] - starts[number]
            found.append(read(self.parts[number], own, rows))
            order.append(rows)
        back = np.argsort(np.concatenate(order))
        return jax.tree.map(lambda *values: np.concatenate(values)[back], *found)
