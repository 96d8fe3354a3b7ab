"""Where the records of a TFDS split expression lie, and whether two expressions overlap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diffusion_jax.errors import ConfigError, nearest


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A run of consecutive records of one file.

    Attributes:
      path: of the file.
      first_record: number of the first record of the run within the file.
      first_id: id of that record: its number in all splits of the data set.
      count: records in the run.
    """

    path: str
    first_record: int
    first_id: int
    count: int


def shards_of(builder: Any, field: str, expression: str) -> list[Shard]:
    """The runs of records that make up `expression`, with ids counted over all stored splits.

    Raises:
      ConfigError: unknown split or malformed expression; `field` names the option.
    """
    splits = builder.info.splits
    first_ids: dict[str, int] = {}
    total = 0
    for name in sorted(splits):
        for file in splits[name].file_instructions:
            first_ids[file.filename] = total
            total += file.examples_in_shard
    try:
        files = splits[expression].file_instructions
    except (ValueError, KeyError, AssertionError) as error:
        close = nearest(expression, splits)
        hint = f" (did you mean {close!r}?)" if close else ""
        raise ConfigError(
            f"{field}={expression!r} is no split of {builder.info.full_name}{hint}; "
            f"known: {', '.join(splits)}, and parts such as 'train[:90%]'"
        ) from error
    return [
        Shard(
            path=file.filename,
            first_record=file.skip,
            first_id=first_ids[file.filename] + file.skip,
            count=file.take if file.take >= 0 else file.examples_in_shard - file.skip,
        )
        for file in files
    ]


def check_disjoint(
    train: Sequence[Shard], validation: Sequence[Shard], train_name: str, validation_name: str
) -> None:
    """Raise a ConfigError if an example is in both."""
    for ours in train:
        for theirs in validation:
            first = max(ours.first_id, theirs.first_id)
            end = min(ours.first_id + ours.count, theirs.first_id + theirs.count)
            if first < end:
                raise ConfigError(
                    f"data.tfds.validation={validation_name!r} overlaps "
                    f"data.tfds.train={train_name!r}; choose disjoint parts, such as "
                    "train='train[:95%]', validation='train[95%:]'"
                )
