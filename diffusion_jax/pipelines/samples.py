"""What a pipeline returns."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples:
    """Samples on the host.

    Attributes:
        x: [N, *shape]; uint8 for images and bits, int32 for tokens, else float32.
        label: [N] int32 where the model is class-conditional, else None.
        text: [N] prompts where the model is conditioned by captions, else None.
        scalar: [N, k] float32, the numbers that conditioned the model, where they were given.
        trajectory: [steps + 1, N, *shape] like `x`, from noise to data, if asked for.
        finite: [N] bool, whether all values were numbers before they were rounded to pixels.
    """

    x: np.ndarray
    label: np.ndarray | None = None
    text: np.ndarray | None = None
    scalar: np.ndarray | None = None
    trajectory: np.ndarray | None = None
    finite: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.x)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.x, dtype=dtype, copy=copy)

    def arrays(self) -> dict[str, np.ndarray]:
        """The fields that are there, as `samples.npz` holds them."""
        fields = {
            "x": self.x,
            "label": self.label,
            "text": self.text,
            "scalar": self.scalar,
            "trajectory": self.trajectory,
        }
        return {name: value for name, value in fields.items() if value is not None}
