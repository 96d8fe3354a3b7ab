"""Batches as pure functions of (seed, position, global batch size)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from diffusion_jax.data.order import shuffled_indices
from diffusion_jax.data.spec import Batch, Source
from diffusion_jax.errors import ConfigError, DataError


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ConfigError(f"config.batch_size={batch_size}: expected at least 1")


def _rows(rows: Int64[np.ndarray, " local"] | None, batch_size: int) -> Int64[np.ndarray, " local"]:
    return np.arange(batch_size, dtype=np.int64) if rows is None else rows


def _check_finite(batch: Batch) -> Batch:
    x = batch["x"]
    finite = np.isfinite(x).reshape(len(x), -1).all(axis=1)
    if not finite.all():
        ids = ", ".join(str(int(i)) for i in batch["id"][~finite][:8])
        raise DataError(
            f"{int((~finite).sum())} of {len(x)} examples of a batch hold non-finite values; "
            f"their ids: {ids}"
        )
    return batch


@dataclass(frozen=True, kw_only=True)
class Loader:
    """Shuffled batches without end; holds no state, so any thread may ask for any position.

    Position q of the run shows example `permutation(seed, q // n)[q % n]` of a source of n
    examples; batches span the ends of epochs. A changed batch size or number of processes
    therefore goes on in the same sequence.

    Attributes:
      source: of the examples.
      batch_size: global, over all processes.
      seed: of the order and the augmentations.
      rows: int64 [local], which rows of the global batch this process yields, in that order; None
        for all. On a torus of hosts they are no single block.

    Raises:
      ConfigError: the batch size is not positive.
      DataError: the source is empty.
    """

    source: Source
    batch_size: int
    seed: int
    rows: Int64[np.ndarray, " local"] | None = None

    def __post_init__(self) -> None:
        _check_batch_size(self.batch_size)
        if len(self.source) == 0:
            raise DataError("the data set has no examples; expected at least 1")

    def _indices(self, start: int, count: int) -> Int64[np.ndarray, " count"]:
        if start < 0:
            raise ValueError(f"position={start}: expected 0 or more examples")
        return shuffled_indices(start, count, len(self.source), self.seed)

    def batch(self, position: int) -> Batch:
        """This process's part of the global batch that starts at `position` (in examples).

        Values that are not finite pass: the training step skips such a batch and names its ids.

        Raises:
          DataError: an example cannot be read.
        """
        rows = _rows(self.rows, self.batch_size)
        return self.source.fetch(self._indices(position, self.batch_size)[rows], position + rows)

    def ids(self, position: int) -> Int64[np.ndarray, " batch"]:
        """Ids of the whole global batch at `position`, without reading the examples."""
        return self.source.ids(self._indices(position, self.batch_size))


def sequential_batches(
    source: Source,
    batch_size: int,
    limit: int | None = None,
    *,
    rows: Int64[np.ndarray, " local"] | None = None,
) -> Iterator[Batch]:
    """The examples in order, without augmentation, in batches of one size.

    Args:
      source: of the examples.
      batch_size: global, over all processes.
      limit: stop after this many examples; None for all.
      rows: int64 [local], which rows of each global batch to yield; None for all.

    Yields:
      Batches with `mask` bool [local batch]: False marks the rows that repeat the last example to
      fill the last batch. Every process yields the same number of batches.

    Raises:
      ConfigError: the batch size or the limit is not positive.
      DataError: an example cannot be read or is not finite.
    """
    _check_batch_size(batch_size)
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit}: expected at least 1 example, or None for all")
    count = len(source) if limit is None else min(limit, len(source))
    return _sequential(source, count, batch_size, _rows(rows, batch_size))


def _sequential(
    source: Source, count: int, batch_size: int, rows: Int64[np.ndarray, " local"]
) -> Iterator[Batch]:
    for start in range(0, count, batch_size):
        places = start + rows
        batch = _check_finite(source.fetch(np.minimum(places, count - 1)))
        yield {**batch, "mask": places < count}
