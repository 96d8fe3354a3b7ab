"""WebDataset: tar shards whose members of one stem make a sample (`000017.jpg`, `000017.txt`).

Shards are made to be streamed. Here their headers are read once at the start, and then each picture
is read where it lies: the order of a run is then a true shuffle, and resumes anywhere.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64

from diffusion_jax.data import metadata
from diffusion_jax.data.annotations import Annotations, Conditioning, Strings
from diffusion_jax.data.annotations import captions as as_captions
from diffusion_jax.data.identity import Names
from diffusion_jax.data.listing import check_path, files_at
from diffusion_jax.data.own import Options, build, check_choice, chosen_labels, options_among
from diffusion_jax.data.pictures import PictureError
from diffusion_jax.data.progress import progress
from diffusion_jax.data.spec import Source, Split
from diffusion_jax.data.tar_index import Samples, read_index, read_members
from diffusion_jax.data.workers import workers as shared_workers
from diffusion_jax.errors import DataError

_LOG = logging.getLogger(__name__)
_FIELD = "data.webdataset"
_LABELS = ("auto", "cls", "none")
_CAPTIONS = ("auto", "txt", "json", "none")


def webdataset(
    split: Split,
    *,
    path: str | os.PathLike[str],
    image_size: int | None = None,
    channels: int = 3,
    crop: str = "center",
    flip: bool = False,
    background: str = "white",
    image_suffix: str = "",
    labels: str = "auto",
    captions: str = "auto",
    text_column: str = "text",
    text_length: int = 128,
    scalars: Sequence[str] = (),
    validation_share: float = 0.05,
    max_unreadable: int = 0,
    memory: int = 2 << 30,
    workers: int | None = None,
) -> Source:
    """Pictures out of tar shards; other options: see `own.Options`.

    The id, and whether a sample is held out, are hashes of its shard's file name and its key.

    Args:
      split: which part of the samples.
      path: a shard, a folder of them, or a pattern with `*`, `{0000..0099}` or `{a,b}`.
      image_suffix: of the pictures, such as "jpg", where a sample has several; "" for any.
      labels: "cls": by `.cls`, an integer; "auto": so where samples have it; or "none".
      captions: "txt": by `.txt`; "json": by `text_column` of `.json`; "auto": whichever there is
        of the two, in this order; or "none".
      text_column: key of the caption in `.json`, which also holds `scalars`.

    Raises:
      ConfigError: an option out of range, one class only, or mixed sizes without a size.
      DataError: shards are missing, damaged or cut short, samples incomplete, or more than
        `max_unreadable` pictures cannot be read.
    """
    options = options_among(locals())
    options.check(_FIELD)
    check_choice(f"{_FIELD}.labels", labels, _LABELS)
    check_choice(f"{_FIELD}.captions", captions, _CAPTIONS)
    title = os.fspath(path)
    samples = _samples(check_path(path, "tar shards"), image_suffix, workers)
    annotations = _annotations(samples, labels, captions, text_column, options)
    store = TarStore(
        paths=samples.paths,
        shards=samples.shards,
        keys=samples.keys,
        offsets=samples.offsets["picture"],
        sizes=samples.sizes["picture"],
        annotations=annotations,
    )
    names = Names(len(store), samples.name)
    classes = 0 if annotations.labels is None else int(annotations.labels.max()) + 1
    return build(split, store, names, classes, options, field=_FIELD, title=title)


def _samples(path: str, suffix: str, workers: int | None) -> Samples:
    shards = files_at(path, ".tar")
    with progress(f"index of {path}", len(shards)) as advance:
        samples = read_index(shards, suffix, shared_workers(workers), advance)
    others = ", ".join(f"{count} {kind}" for kind, count in samples.others.most_common(8))
    if others:
        _LOG.warning("%s: members that no sample uses are left aside: %s", path, others)
    return samples


@dataclass(frozen=True, kw_only=True)
class TarStore:
    """Pictures that are members of tar shards.

    Attributes:
      paths: of all shards.
      shards: int32 [n], in which of them each picture lies.
      keys: of the samples.
      offsets, sizes: int64 [n], in bytes.
      annotations: what comes with them.
    """

    paths: tuple[str, ...]
    shards: Int32[np.ndarray, " n"]
    keys: Strings
    offsets: Int64[np.ndarray, " n"]
    sizes: Int64[np.ndarray, " n"]
    annotations: Annotations

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, rows: Int64[np.ndarray, " m"]) -> TarStore:
        """The store of the pictures at `rows`."""
        return TarStore(
            paths=self.paths,
            shards=self.shards[rows],
            keys=self.keys.take(rows),
            offsets=self.offsets[rows],
            sizes=self.sizes[rows],
            annotations=self.annotations.take(rows),
        )

    def read(
        self, indices: Int64[np.ndarray, " n"]
    ) -> tuple[list[bytes | PictureError], Conditioning]:
        """The files of the pictures at `indices`, and what comes with them."""
        files: list[bytes | PictureError] = []
        for shard, rows in _runs(self.shards[indices]):
            wanted = indices[rows]
            places = zip(self.offsets[wanted].tolist(), self.sizes[wanted].tolist(), strict=True)
            files += read_members(self.paths[shard], places)
        return files, self.annotations.conditioning(indices)

    def place(self, index: int) -> str:
        """Shard and sample of a picture."""
        key = self.keys[index].decode("utf-8", "replace")
        return f"{self.paths[self.shards[index]]}, sample {key!r}"


def _runs(values: Int32[np.ndarray, " n"]) -> Iterator[tuple[int, slice]]:
    """Each stretch of equal values and where it stands."""
    starts = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist()] if len(values) else []
    for start, end in zip(starts, [*starts[1:], len(values)], strict=True):
        yield int(values[start]), slice(start, end)


def _annotations(
    samples: Samples, labels: str, captions: str, text_column: str, options: Options
) -> Annotations:
    """Labels, captions and numbers, as chosen or as found."""
    numbers = None
    if labels == "cls" or (labels == "auto" and samples.has("cls")):
        numbers = _labels(samples, asked_for=labels == "cls")
    if captions == "auto":
        captions = "txt" if samples.has("txt") else "none"
        if captions == "none" and samples.has("json"):
            first = next(iter(_json(samples)))[1]
            captions = "json" if isinstance(first.get(text_column), str) else "none"
    texts: list[str] = []
    values: list[list[float]] = []
    if captions == "txt":
        for row, content in samples.contents("txt"):
            texts.append(_text(content, samples.name(row)).strip())
    if captions == "json" or options.scalars:
        for row, entry in _json(samples):
            place = f"{samples.name(row)}.json"
            values.append([metadata.number(entry, key, place) for key in options.scalars])
            if captions == "json":
                texts.append(metadata.text(entry, text_column, place))
    title = os.path.dirname(samples.paths[0]) or "."
    return Annotations(
        labels=numbers,
        texts=as_captions(texts, options.text_length, title) if captions != "none" else None,
        text_length=options.text_length if captions != "none" else 0,
        scalars=np.array(values, np.float32) if options.scalars else None,
    )


def _labels(samples: Samples, *, asked_for: bool) -> Int32[np.ndarray, " n"] | None:
    numbers = np.empty(len(samples.keys), np.int32)
    for row, content in samples.contents("cls"):
        shown = _text(content, samples.name(row)).strip()
        if not re.fullmatch(r"[0-9]{1,9}", shown):
            raise DataError(f"{samples.name(row)}.cls holds {shown[:40]!r}; expected 0, 1, 2, ...")
        numbers[row] = int(shown)
    return chosen_labels(numbers, asked_for, f"{_FIELD}.labels='cls'", samples.paths[0])


def _text(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: its text is not UTF-8 ({error})") from error


def _json(samples: Samples) -> Iterator[tuple[int, dict[str, Any]]]:
    for row, content in samples.contents("json"):
        try:
            entry = json.loads(content)
        except ValueError as error:
            raise DataError(f"{samples.name(row)}.json is not JSON ({error})") from error
        if not isinstance(entry, dict):
            raise DataError(f"{samples.name(row)}.json: expected an object {{...}}")
        yield row, entry
