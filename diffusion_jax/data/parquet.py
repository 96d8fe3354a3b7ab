"""Parquet files with a column of encoded pictures, as Hugging Face and others publish them.

Parquet is read a row group at a time: to get one picture, all of its group have to be read. Groups
are therefore kept in memory, up to the same number of bytes that a decoded set may take.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32, Int64

from diffusion_jax.data.annotations import Annotations, Conditioning, Strings
from diffusion_jax.data.annotations import captions as as_captions
from diffusion_jax.data.identity import Names
from diffusion_jax.data.listing import check_path, files_at
from diffusion_jax.data.own import Options, build, check_choice, chosen_labels, options_among
from diffusion_jax.data.pictures import PictureError
from diffusion_jax.data.row_groups import RowGroups, check_column, open_row_groups, pyarrow
from diffusion_jax.data.spec import Source, Split
from diffusion_jax.errors import DataError

_FIELD = "data.parquet"
_CHOICES = ("auto", "column", "none")
# Labels have at most nine digits, as those of tar shards.
_HIGHEST = 10**9 - 1


def parquet(
    split: Split,
    *,
    path: str | os.PathLike[str],
    image_size: int | None = None,
    channels: int = 3,
    crop: str = "center",
    flip: bool = False,
    background: str = "white",
    image_column: str = "image",
    labels: str = "auto",
    label_column: str = "label",
    captions: str = "auto",
    text_column: str = "text",
    text_length: int = 128,
    scalars: Sequence[str] = (),
    validation_share: float = 0.05,
    max_unreadable: int = 0,
    memory: int = 2 << 30,
    workers: int | None = None,
) -> Source:
    """Pictures out of Parquet files; other options: see `own.Options`.

    The id, and whether a picture is held out, are hashes of its file's name and row number.

    Args:
      split: which part of the rows.
      path: a file, a folder of them, or a pattern with `*`, `{0000..0099}` or `{a,b}`.
      image_column: encoded pictures, or structs with `bytes`, as Hugging Face stores them.
      labels, captions: "column": of `label_column` (integers or names) and `text_column`; "auto":
        so where there is such a column; or "none".
      memory: also bounds the row groups that are kept of a set too large to be held decoded.

    Raises:
      ConfigError: an option out of range, no such column, one class only, no pyarrow, or mixed
        sizes without a size.
      DataError: files are missing or damaged, rows lack values, or more than `max_unreadable`
        pictures cannot be read.
    """
    options = options_among(locals())
    options.check(_FIELD)
    check_choice(f"{_FIELD}.labels", labels, _CHOICES)
    check_choice(f"{_FIELD}.captions", captions, _CHOICES)
    files = files_at(check_path(path, "Parquet files"), ".parquet")
    groups = open_row_groups(files, image_column, f"{_FIELD}.image_column")
    label = _wanted(groups, labels, "label_column", label_column)
    text = _wanted(groups, captions, "text_column", text_column)
    classes, numbers = _labels(groups, label, asked_for=labels == "column")
    annotations = replace(_annotations(groups, text, options), labels=numbers)
    rows = np.arange(groups.count, dtype=np.int64)
    store = ParquetStore(groups=groups, rows=rows, annotations=annotations)
    names = Names(groups.count, groups.name)
    source = build(split, store, names, classes, options, field=_FIELD, title=os.fspath(path))
    groups.keep(memory)
    return source


@dataclass(frozen=True, kw_only=True)
class ParquetStore:
    """Pictures in rows of Parquet files.

    Attributes:
      groups: of all rows.
      rows: int64 [n], which of them.
      annotations: what comes with them.
    """

    groups: RowGroups
    rows: Int64[np.ndarray, " n"]
    annotations: Annotations

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows: Int64[np.ndarray, " m"]) -> ParquetStore:
        """The store of the pictures at `rows`."""
        taken = self.annotations.take(rows)
        return ParquetStore(groups=self.groups, rows=self.rows[rows], annotations=taken)

    def read(
        self, indices: Int64[np.ndarray, " n"]
    ) -> tuple[list[bytes | PictureError], Conditioning]:
        """The files of the pictures at `indices`, and what comes with them."""
        return self.groups.read(self.rows[indices]), self.annotations.conditioning(indices)

    def place(self, index: int) -> str:
        """File and row of a picture."""
        return self.groups.place(int(self.rows[index]))


def _wanted(groups: RowGroups, choice: str, option: str, column: str) -> str | None:
    """The column to read, if any."""
    if choice == "column":
        check_column(groups, column, f"{_FIELD}.{option}")
    return column if choice != "none" and column in groups.schema.names else None


def _values(groups: RowGroups, column: str) -> Any:
    """The column of all rows, without nulls."""
    chunks, kind = [], groups.schema.field(column).type
    for path, table in zip(groups.files, groups.table([column]), strict=True):
        if table.column(0).type != kind:
            raise DataError(
                f"{path}: the column {column!r} holds {table.column(0).type}; expected {kind}, as "
                f"in {groups.files[0]}"
            )
        chunks += table.column(0).chunks
    array = pyarrow()[0].chunked_array(chunks, type=kind)
    if array.null_count:
        row = next(i for i, value in enumerate(array) if not value.is_valid)
        raise DataError(
            f"{groups.place(row)}: {column!r} is null ({array.null_count} such rows); expected a "
            "value in each"
        )
    return array


def _labels(
    groups: RowGroups, column: str | None, *, asked_for: bool
) -> tuple[Sequence[str] | int, Int32[np.ndarray, " n"] | None]:
    """Classes and labels: integers as they stand, names in alphabetical order."""
    if column is None:
        return 0, None
    types, kind = pyarrow()[0].types, groups.schema.field(column).type
    array = _values(groups, column)
    names: Sequence[str] = ()
    if types.is_string(kind) or types.is_large_string(kind):
        values = array.to_pylist()
        names = sorted(set(values))
        index = {name: number for number, name in enumerate(names)}
        numbers = np.array([index[value] for value in values], np.int32)
    elif types.is_integer(kind):
        numbers = array.to_numpy()
        names = _class_names(groups, column)
    else:
        raise DataError(
            f"{groups.files[0]}: the column {column!r} holds {kind}; expected integers or names of "
            "classes, or labels='none'"
        )
    least, most = int(numbers.min()), int(numbers.max())
    # Before they become int32, where larger ones would stand for other classes.
    highest = len(names) - 1 if names else _HIGHEST
    if least < 0 or most > highest:
        row = int(np.argmin(numbers) if least < 0 else np.argmax(numbers))
        expected = f"0 to {highest}" if names or least >= 0 else "0, 1, 2, ..."
        raise DataError(f"{groups.place(row)}: {column}={numbers[row]}; expected {expected}")
    numbers = numbers.astype(np.int32)
    field = f"{_FIELD}.labels='column'"
    chosen = chosen_labels(numbers, asked_for, field, f"{groups.files[0]}, {column!r}")
    if chosen is None:
        return 0, None
    return names or most + 1, chosen


def _class_names(groups: RowGroups, column: str) -> Sequence[str]:
    """Names of integer classes, from what Hugging Face's library writes into the schema."""
    try:
        described = json.loads((groups.schema.metadata or {})[b"huggingface"])
        return tuple(described["info"]["features"][column]["names"])
    except (KeyError, TypeError, ValueError):
        return ()


def _annotations(groups: RowGroups, text: str | None, options: Options) -> Annotations:
    """Captions and numbers."""
    return Annotations(
        texts=None if text is None else _captions(groups, text, options.text_length),
        text_length=0 if text is None else options.text_length,
        scalars=_scalars(groups, options.scalars) if options.scalars else None,
    )


def _captions(groups: RowGroups, column: str, length: int) -> Strings:
    types, kind = pyarrow()[0].types, groups.schema.field(column).type
    if not (types.is_string(kind) or types.is_large_string(kind)):
        raise DataError(
            f"{groups.files[0]}: the column {column!r} holds {kind}; expected text, or "
            "captions='none'"
        )
    return as_captions(
        (value.as_py() for value in _values(groups, column)), length, groups.files[0]
    )


def _scalars(groups: RowGroups, columns: Sequence[str]) -> Float32[np.ndarray, "n k"]:
    types, numbers = pyarrow()[0].types, []
    for column in columns:
        check_column(groups, column, f"{_FIELD}.scalars")
        kind = groups.schema.field(column).type
        if not (types.is_integer(kind) or types.is_floating(kind)):
            raise DataError(f"{groups.files[0]}: {column!r} holds {kind}; expected numbers")
        values = _values(groups, column).to_numpy().astype(np.float32)
        if not np.isfinite(values).all():
            row = int(np.flatnonzero(~np.isfinite(values))[0])
            raise DataError(f"{groups.place(row)}: {column}={values[row]}; expected finite numbers")
        numbers.append(values)
    return np.stack(numbers, axis=-1)
