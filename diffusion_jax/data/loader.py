"""Batches as pure functions of (seed, position, global batch size)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from diffusion_jax.data.order import shuffled_indices
from diffusion_jax.data.spec import Batch, Source
from diffusion_jax.errors import ConfigError, DataError


def _check_batch_size(batch_size: int, process_index: int, process_count: int) -> None:
    if not 0 <= process_index < process_count:
        raise ConfigError(
            f"process_index={process_index}: expected 0 to {process_count - 1} "
            f"for process_count={process_count}"
        )
    if batch_size < 1:
        raise ConfigError(f"config.batch_size={batch_size}: expected at least 1")
    if batch_size % process_count:
        below = batch_size - batch_size % process_count
        choices = [str(n) for n in (below, below + process_count) if n]
        raise ConfigError(
            f"config.batch_size={batch_size}: expected a multiple of the {process_count} "
            f"processes, such as {' or '.join(choices)}"
        )


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
      process_index: which contiguous part of the global batch this process yields; the parts in
        process order concatenate to exactly the global batch.
      process_count: must divide batch_size.

    Raises:
      ConfigError: process_count does not divide batch_size.
      DataError: the source is empty.
    """

    source: Source
    batch_size: int
    seed: int
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self) -> None:
        _check_batch_size(self.batch_size, self.process_index, self.process_count)
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
        local = self.batch_size // self.process_count
        start = position + self.process_index * local
        positions = start + np.arange(local, dtype=np.int64)
        return self.source.fetch(self._indices(start, local), positions)

    def ids(self, position: int) -> Int64[np.ndarray, " batch"]:
        """Ids of the whole global batch at `position`, without reading the examples."""
        return self.source.ids(self._indices(position, self.batch_size))


def sequential_batches(
    source: Source,
    batch_size: int,
    limit: int | None = None,
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """The examples in order, without augmentation, in batches of one size.

    Args:
      source: of the examples.
      batch_size: global, over all processes.
      limit: stop after this many examples; None for all.
      process_index: which contiguous part of each global batch to yield.
      process_count: must divide batch_size.

    Yields:
      Batches with `mask` bool [local batch]: False marks the rows that repeat the last example to
      fill the last batch. Every process yields the same number of batches.

    Raises:
      ConfigError: process_count does not divide batch_size, or the limit is not positive.
      DataError: an example cannot be read or is not finite.
    """
    _check_batch_size(batch_size, process_index, process_count)
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit}: expected at least 1 example, or None for all")
    count = len(source) if limit is None else min(limit, len(source))
    local = batch_size // process_count
    return _sequential(source, count, batch_size, local, process_index * local)


def _sequential(
    source: Source, count: int, batch_size: int, local: int, offset: int
) -> Iterator[Batch]:
    for start in range(0, count, batch_size):
        rows = start + offset + np.arange(local, dtype=np.int64)
        batch = _check_finite(source.fetch(np.minimum(rows, count - 1)))
        yield {**batch, "mask": rows < count}
