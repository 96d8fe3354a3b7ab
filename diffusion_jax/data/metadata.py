"""Captions and numbers of a folder of pictures: `metadata.jsonl`, `metadata.csv`, or text files
beside them."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64

from diffusion_jax.data.annotations import Annotations, captions
from diffusion_jax.data.identity import normal
from diffusion_jax.errors import DataError, nearest

FILES = ("metadata.jsonl", "metadata.csv")
"""One JSON object a line, or one row under a head of names: `file_name` relative to the folder, the
caption, and numbers."""
_LARGEST = float(np.finfo(np.float32).max)


def file_in(root: str) -> str | None:
    """The path of the folder's file of captions and numbers; None where there is none.

    Raises:
      DataError: it has two.
    """
    found = [name for name in FILES if os.path.exists(os.path.join(root, name))]
    if len(found) > 1:
        raise DataError(f"{root} holds {' and '.join(found)}; expected one of them")
    return os.path.join(root, found[0]) if found else None


def from_metadata(
    root: str,
    path: str,
    names: Sequence[str],
    *,
    text_column: str | None,
    length: int,
    scalars: Sequence[str],
) -> Annotations:
    """Captions and numbers of the pictures `names` by a file in their folder.

    Args:
      root: the folder.
      path: the file, as from `file_in`.
      names: pictures in the folder, relative, with forward slashes.
      text_column: key of the captions, or None to read no captions.
      length: bytes to which captions are cut.
      scalars: keys of numbers.

    Raises:
      DataError: a line is malformed, names a file that is not there or was named before, or lacks
        a value; or a picture has no line.
    """
    rows = {normal(name): row for row, name in enumerate(names)}
    lines = np.zeros(len(names), np.int64)
    texts: list[str] = [""] * len(names)
    numbers = np.zeros((len(names), len(scalars)), np.float32)
    missing: list[str] = []
    entries = _objects(path) if path.endswith(".jsonl") else _rows(path, scalars)
    for line, values in entries:
        place = f"{path}, line {line}"
        name = text(values, "file_name", place)
        row = rows.get(normal(os.path.normpath(name).replace(os.sep, "/")))
        if row is None:
            missing.append(f"{name!r} (line {line})")
            continue
        if lines[row]:
            raise DataError(f"{place}: file_name={name!r} stands in line {lines[row]} already")
        lines[row] = line
        if text_column is not None:
            texts[row] = text(values, text_column, place, " (or captions='none')")
        numbers[row] = [number(values, key, place) for key in scalars]
    _check_complete(path, names, missing, lines)
    return Annotations(
        texts=None if text_column is None else captions(texts, length, path),
        text_length=0 if text_column is None else length,
        scalars=numbers if scalars else None,
    )


def _check_complete(
    path: str, names: Sequence[str], missing: Sequence[str], lines: Int64[np.ndarray, " n"]
) -> None:
    """Raises DataError for files that are not there, and for pictures without a line."""
    if missing:
        close = nearest(missing[0].split("'")[1], names) if "'" in missing[0] else None
        raise DataError(
            f"{path} names {len(missing)} files that are not there as pictures: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
            + (f" (did you mean {close!r}?)" if close else "")
        )
    if not lines.all():
        without = np.flatnonzero(lines == 0)
        raise DataError(
            f"{path} has no line for {len(without)} of {len(names)} pictures, the first "
            f"{names[without[0]]!r}; add lines, remove the files, or set captions='none'"
        )


def from_text_files(root: str, names: Sequence[str], length: int) -> Annotations:
    """Captions out of `stem.txt` beside each picture `stem.png`.

    Raises:
      DataError: a picture has none, or one that is not UTF-8.
    """
    texts = []
    for name in names:
        path = os.path.join(root, os.path.splitext(name)[0] + ".txt")
        try:
            with open(path, encoding="utf-8") as file:
                texts.append(file.read().strip())
        except FileNotFoundError:
            raise DataError(
                f"{path} is missing: with captions='files' each picture needs a text file"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read as UTF-8 text ({error})") from error
    return Annotations(texts=captions(texts, length, root), text_length=length)


def _objects(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line that is not empty."""
    try:
        with open(path, encoding="utf-8") as file:
            for line, content in enumerate(file, start=1):
                if not content.strip():
                    continue
                try:
                    values = json.loads(content)
                except ValueError as error:
                    raise DataError(f"{path}, line {line}: not JSON ({error})") from error
                if not isinstance(values, dict):
                    raise DataError(f"{path}, line {line}: expected an object {{...}}")
                yield line, values
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error})") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _rows(path: str, numeric: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of its first line, values by the head) of each row of a CSV file; the values of the
    columns `numeric` as numbers where they are some."""
    line = 1
    try:
        # Spreadsheets put a byte order mark before the first name.
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            head = next(reader, [])
            if twice := sorted({name for name in head if head.count(name) > 1}):
                raise DataError(f"{path}, line 1: the column {twice[0]!r} stands there twice")
            line = reader.line_num + 1
            for cells in reader:
                if cells and len(cells) != len(head):
                    raise DataError(
                        f"{path}, line {line}: {len(cells)} values; expected {len(head)}, as the "
                        "first line has names (texts with commas need quotes)"
                    )
                values: dict[str, Any] = dict(zip(head, cells, strict=False))
                for name in {*numeric} & {*values}:
                    values[name] = _as_number(values[name])
                if cells:
                    yield line, values
                line = reader.line_num + 1
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error})") from error
    except csv.Error as error:
        raise DataError(f"{path}, line {line}: not CSV ({error})") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _as_number(cell: str) -> float | str:
    try:
        return float(cell)
    except ValueError:
        return cell


def text(values: dict[str, Any], key: str, place: str, instead: str = "") -> str:
    """The text under `key`, or a DataError that names `place` and what else there is to do."""
    value = values.get(key)
    if not isinstance(value, str):
        raise DataError(f"{place}: {_given(values, key)}; expected text{instead}")
    return value


def number(values: dict[str, Any], key: str, place: str) -> float:
    """The finite number under `key`, or a DataError that names `place`."""
    value = values.get(key)
    # Compared as it stands: JSON has integers that no float holds, and a batch carries float32.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST:
        raise DataError(f"{place}: {_given(values, key)[:80]}; expected a finite number of float32")
    return float(value)


def _given(values: dict[str, Any], key: str) -> str:
    if key in values:
        return f"{key}={values[key]!r}"
    close = nearest(key, values)
    return f"no {key!r}" + (f" (did you mean {close!r}?)" if close else "")
