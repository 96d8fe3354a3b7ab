"""Random access to the rows of a binary column of Parquet files, a row group at a time."""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
from jaxtyping import Int64

from diffusion_jax.data.pictures import PictureError
from diffusion_jax.errors import ConfigError, DataError, unknown_name

_LOG = logging.getLogger(__name__)
# Bytes of row groups that are kept at least: enough to read from front to back in threads.
_LEAST = 64 << 20
# Rows of a group from which on random reads of groups that are not kept deserve a warning.
_LARGE = 16


def pyarrow() -> tuple[Any, Any]:
    """The modules pyarrow and pyarrow.parquet.

    Raises:
      ConfigError: they are not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(
            "data.name='parquet' needs pyarrow; type: pip install 'diffusion-jax[parquet]'"
        ) from None
    return pyarrow, pyarrow.parquet


class RowGroups:
    """The row groups of some files, and those that were read last; safe to call from threads.

    Attributes:
      files: paths.
      schema: of the files, which all have the same columns.
      count: rows of all files.
    """

    def __init__(self, files: Sequence[str], column: str, metadata: Sequence[Any]) -> None:
        self.files, self._column, self._metadata = tuple(files), column, tuple(metadata)
        self.schema = metadata[0].schema.to_arrow_schema()
        self._groups = [
            (file, group, entry.row_group(group).num_rows)
            for file, entry in enumerate(metadata)
            for group in range(entry.num_row_groups)
        ]
        self._starts = np.cumsum([0] + [rows for _, _, rows in self._groups])
        self._file_starts = np.cumsum([0] + [entry.num_rows for entry in metadata])
        self.count = int(self._starts[-1])
        self._limit, self._total, self._warn = _LEAST, 0, False
        # A future stands for a group that a thread is reading while others wait for it.
        self._kept: OrderedDict[int, Future[Any]] = OrderedDict()
        self._lock = threading.Lock()

    def name(self, row: int) -> str:
        """File name and row number, the same wherever the file lies."""
        file, number = self._file_of(row)
        return f"{os.path.basename(self.files[file])}/{number}"

    def place(self, row: int) -> str:
        """File and row number, for messages."""
        file, number = self._file_of(row)
        return f"{self.files[file]}, row {number}"

    def _file_of(self, row: int) -> tuple[int, int]:
        file = int(np.searchsorted(self._file_starts, row, side="right")) - 1
        return file, row - int(self._file_starts[file])

    def keep(self, limit: int) -> None:
        """Sets how many bytes of row groups may be kept; warns when that is not enough for all."""
        self._limit, self._warn = max(limit, _LEAST), True

    def read(self, rows: Int64[np.ndarray, " n"]) -> list[bytes | PictureError]:
        """The pictures at `rows`.

        Raises:
          DataError: a file cannot be read.
        """
        numbers = np.searchsorted(self._starts, rows, side="right") - 1
        pictures: list[bytes | PictureError] = []
        for row, number in zip(rows.tolist(), numbers.tolist(), strict=True):
            value = self._group(number)[row - int(self._starts[number])].as_py()
            if isinstance(value, dict):
                value = value["bytes"]
            pictures.append(value if value is not None else PictureError("it has no bytes (null)"))
        return pictures

    def table(self, columns: Sequence[str]) -> Iterator[Any]:
        """Some columns of all rows, a file after the other, as pyarrow tables.

        Raises:
          DataError: a file cannot be read.
        """
        _, pq = pyarrow()
        for path in self.files:
            try:
                yield pq.read_table(path, columns=list(columns), partitioning=None)
            except (OSError, ValueError) as error:
                raise _unreadable(path, error) from error

    def _group(self, number: int) -> Any:
        with self._lock:
            future = self._kept.get(number)
            if future is not None:
                self._kept.move_to_end(number)
            else:
                mine = self._kept[number] = Future()
        if future is not None:
            return future.result()
        try:
            array = self._load(number)
        except BaseException as error:
            with self._lock:
                del self._kept[number]
            mine.set_exception(error)
            raise
        mine.set_result(array)
        self._forget(array.nbytes)
        return array

    def _load(self, number: int) -> Any:
        _, pq = pyarrow()
        file, group, _ = self._groups[number]
        try:
            with pq.ParquetFile(self.files[file], metadata=self._metadata[file]) as opened:
                table = opened.read_row_group(group, columns=[self._column], use_threads=False)
        except (OSError, ValueError) as error:
            raise _unreadable(self.files[file], error) from error
        return table.column(0)

    def _forget(self, added: int) -> None:
        """Drops the groups that were not used for longest."""
        with self._lock:
            self._total += added
            for number in list(self._kept)[:-1]:
                if self._total <= self._limit:
                    return
                if self._kept[number].done():
                    self._total -= self._kept.pop(number).result().nbytes
            warn, self._warn = self._warn, False
        rows = self._groups[0][2]
        if warn and rows > _LARGE:
            _LOG.warning(
                "data.parquet: groups of %d rows are read whole for one picture, and memory=%d "
                "does not keep them all; raise it, or write the files with row_group_size=%d",
                *(rows, self._limit, _LARGE),
            )


def open_row_groups(files: Sequence[str], column: str, field: str) -> RowGroups:
    """The files, with a column that can hold pictures.

    Args:
      files: paths.
      column: name of the column.
      field: of the config that names it.

    Raises:
      ConfigError: no such column, or pyarrow is not installed.
      DataError: a file is damaged, has other columns than the first, or none has rows; or the
        column holds no encoded pictures.
    """
    _, pq = pyarrow()
    metadata = []
    for path in files:
        try:
            metadata.append(pq.read_metadata(path))
        except (OSError, ValueError) as error:
            raise _unreadable(path, error) from error
        names = metadata[-1].schema.to_arrow_schema().names
        if set(names) != set(metadata[0].schema.to_arrow_schema().names):
            raise DataError(f"{path} has other columns ({', '.join(names)}) than {files[0]}")
    groups = RowGroups(files, column, metadata)
    check_column(groups, column, field)
    kind = groups.schema.field(column).type
    if not _holds_pictures(kind):
        raise DataError(
            f"{files[0]}: the column {column!r} holds {kind}; expected the bytes of picture files, "
            "or structs with 'bytes'"
        )
    if not groups.count:
        raise DataError(f"{files[0]} and the {len(files) - 1} files after it have no rows")
    return groups


def check_column(groups: RowGroups, column: str, field: str) -> None:
    """Raises ConfigError where the files have no such column."""
    if column not in groups.schema.names:
        raise ConfigError(unknown_name(field, column, groups.schema.names))


def _holds_pictures(kind: Any) -> bool:
    types = pyarrow()[0].types
    if types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _holds_pictures(kind.field(index).type)
    return types.is_binary(kind) or types.is_large_binary(kind)


def _unreadable(path: str, error: Exception) -> DataError:
    reason = " ".join(str(error).split())[:300]
    return DataError(f"{path} cannot be read as Parquet ({reason})")
