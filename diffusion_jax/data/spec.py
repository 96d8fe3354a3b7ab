"""What a source of examples is, and what it says about them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64

Batch = dict[str, Any]
"""`{"x": float32 [n, *shape], "conditioning": {...}, "id": int64 [n]}`; tokens are int32.

Conditioning holds what the examples carry beside themselves: `label` int32 [n]; `text` int32
[n, text_length], the caption's UTF-8 bytes + 1 and zeros behind them; `scalar` float32 [n, k]. The
arrays are the caller's own to change.
"""

Split = Literal["train", "validation"]


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Shape and meaning of one example.

    Attributes:
      shape: of one example: (height, width, channels), (dimensions,) or (length,); of tokens
        any number of axes, such as (length,) of a text or (height, width) of a binary picture.
      kind: how to draw it: image, latent, points, bits or tokens.
      num_classes: number of labels, 0 where there is none.
      classes: names of the labels, in order; empty where they have none.
      range: (low, high) of the values. Images fill [-1, 1], bits are 0 or 1, tokens
        0 to vocabulary - 1; for points it is the stretch of the axes in which to draw them.
      text_length: tokens of a caption, 0 where there is none.
      scalars: names of the numbers that come with an example, in order.
      vocabulary: number of tokens, 0 for data of another kind.
      characters: of a text, what each token stands for, in order; empty for others.
    """

    shape: tuple[int, ...]
    kind: Literal["image", "latent", "points", "bits", "tokens"]
    num_classes: int = 0
    classes: tuple[str, ...] = ()
    range: tuple[float, float] = (-1.0, 1.0)
    text_length: int = 0
    scalars: tuple[str, ...] = ()
    vocabulary: int = 0
    characters: str = ""


@runtime_checkable
class Source(Protocol):
    """Examples with random access, each with an id of its own; safe to call from threads."""

    @property
    def spec(self) -> DataSpec:
        """Shape and meaning of the examples."""
        ...

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def ids(self, indices: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """Stable ids, unique over all splits of the data set and independent of any order."""
        ...

    def fetch(
        self,
        indices: Int64[np.ndarray, " n"],
        positions: Int64[np.ndarray, " n"] | None = None,
    ) -> Batch:
        """The examples at `indices`.

        Args:
          indices: int64 [n] in [0, len).
          positions: int64 [n], where in the run each example stands; augmentations derive their
            draws from it. None means no augmentation.

        Raises:
          DataError: an example cannot be read.
        """
        ...
