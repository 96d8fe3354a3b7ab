"""What the sources of one's own pictures share: their options, and the way to a source.

Folders, tar shards and Parquet files differ in where the pictures lie. Held-out split, ids, sizes,
memory and augmentations are decided here, once.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32, Int64

from diffusion_jax.data.annotations import Annotations
from diffusion_jax.data.held import held_if_it_fits
from diffusion_jax.data.identity import held_out, stable_ids
from diffusion_jax.data.picture_source import Faults, PictureSource, Store
from diffusion_jax.data.pictures import PictureError, View, size_of, view
from diffusion_jax.data.progress import progress
from diffusion_jax.data.spec import DataSpec, Source, Split
from diffusion_jax.data.transforms import HorizontalFlip
from diffusion_jax.data.workers import Workers, workers
from diffusion_jax.errors import ConfigError, DataError, unknown_name

_LOG = logging.getLogger(__name__)
_CHUNK = 128
# Rows of a table of classes that are still cheap where no picture uses them.
_MOST_SPARE_CLASSES = 2**16
PATH_FLAG = "--config.data.path"


@runtime_checkable
class OwnStore(Store, Protocol):
    """A store with names and annotations, of which parts can be taken."""

    @property
    def annotations(self) -> Annotations:
        """What comes with the pictures."""
        ...

    def take(self, rows: Int64[np.ndarray, " m"]) -> Any:
        """The store of the pictures at `rows`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of all sources of one's own pictures.

    Attributes:
      image_size: side in pixels to crop to a square and resize to; None keeps the stored size,
        which then has to be one for all.
      channels: 1 (grey), 3 (RGB) or 4 (RGB and opacity).
      crop: "center", or "random" windows in training (the middle in validation).
      flip: mirror half of the training pictures.
      background: colour that shows where a picture is transparent, by name or code.
      text_length: bytes of a caption that a batch carries; longer captions are cut and counted.
      scalars: names of numeric columns that condition the network.
      validation_share: part that is held out, example by example.
      max_unreadable: pictures of a split that may be unreadable; they are named in the log. Each
        process counts those that it read: of several, the first past the limit ends the run.
      memory: bytes up to which a split is decoded once and held.
      workers: threads that read and decode; None: one a core, at most 16.
    """

    image_size: int | None
    channels: int
    crop: str
    flip: bool
    background: str
    text_length: int
    scalars: Sequence[str]
    validation_share: float
    max_unreadable: int
    memory: int
    workers: int | None

    def check(self, field: str) -> View:
        """The view of the pictures.

        Raises:
          ConfigError: an option out of range; `field` names the section.
        """
        if not 0.0 < self.validation_share < 1.0:
            value = self.validation_share
            raise ConfigError(f"{field}.validation_share={value}: expected between 0 and 1")
        if self.text_length < 1:
            raise ConfigError(f"{field}.text_length={self.text_length}: expected at least 1")
        check_limits(
            field,
            max_unreadable=self.max_unreadable,
            memory=self.memory,
            workers=self.workers,
        )
        if len(set(self.scalars)) < len(self.scalars):
            raise ConfigError(f"{field}.scalars={tuple(self.scalars)} names a column twice")
        return view(
            field,
            image_size=self.image_size,
            channels=self.channels,
            crop=self.crop,
            background=self.background,
        )


def options_among(arguments: Mapping[str, Any]) -> Options:
    """The shared options among all the arguments of a source."""
    return Options(**{field.name: arguments[field.name] for field in fields(Options)})


def check_limits(field: str, *, max_unreadable: int, memory: int, workers: int | None) -> None:
    """Raises ConfigError for a limit below zero or a number of workers below one."""
    for name, value in (("max_unreadable", max_unreadable), ("memory", memory)):
        if value < 0:
            raise ConfigError(f"{field}.{name}={value}: expected at least 0")
    if workers is not None and workers < 1:
        raise ConfigError(f"{field}.workers={workers}: expected at least 1, or None")


def check_choice(field: str, value: str, known: Sequence[str]) -> None:
    """Raises ConfigError unless `value` is one of `known`."""
    if value not in known:
        raise ConfigError(unknown_name(field, value, known))


def chosen_labels(
    numbers: Int32[np.ndarray, " n"], asked_for: bool, field: str, title: str
) -> Int32[np.ndarray, " n"] | None:
    """Labels as stored, or None where all are the same and nobody asked for classes.

    Raises:
      ConfigError: all are the same although classes are asked for.
    """
    if len(numbers) and (numbers != numbers[0]).any():
        return numbers
    if asked_for:
        raise ConfigError(
            f"{field}: all {len(numbers)} labels of {title} are {numbers[0]}; "
            "expected two classes or more, or labels='none'"
        )
    return None


def build(
    split: Split,
    store: OwnStore,
    names: Sequence[str],
    classes: Sequence[str] | int,
    options: Options,
    *,
    field: str,
    title: str,
) -> Source:
    """A source of one split of a store.

    Args:
      split: which.
      store: of all pictures of both splits.
      names: that make their ids and decide the split; unique.
      classes: names of the labels, or their number where they have none.
      options: see `Options`.
      field: of the config, for messages.
      title: what the data are called in messages.

    Raises:
      ConfigError: an option out of range, an empty split, mixed sizes without a size, or label
        numbers far beyond the number of pictures.
      DataError: two names are the same, or too many pictures cannot be read.
    """
    picture_view, threads = options.check(field), workers(options.workers)
    try:
        ids = stable_ids(names)
    except DataError as error:
        raise DataError(f"{title}: {error}") from None
    apart = held_out(ids, options.validation_share)
    _check_split(apart, options, field, title)
    shape = _shape(store, picture_view, threads, field=field, title=title)
    spec = DataSpec(
        shape=shape,
        kind="image",
        num_classes=classes if isinstance(classes, int) else len(classes),
        classes=() if isinstance(classes, int) else tuple(classes),
        text_length=0 if store.annotations.texts is None else options.text_length,
        scalars=tuple(options.scalars),
    )
    _check_classes(spec, len(ids), field, title)
    rows = np.flatnonzero(apart == (split == "validation"))
    if split == "train":
        _report(store.annotations, spec, rows, title)
    title = f"{title} ({split})"
    pictures = PictureSource(
        spec=spec,
        store=store.take(rows),
        example_ids=ids[rows],
        view=picture_view,
        faults=Faults(options.max_unreadable, title),
        workers=threads,
    )
    source = held_if_it_fits(pictures, options.memory, title)
    return HorizontalFlip(source=source) if options.flip and split == "train" else source


def _check_split(apart: np.ndarray, options: Options, field: str, title: str) -> None:
    for split, count in (("training", (~apart).sum()), ("validation", apart.sum())):
        if not count:
            raise ConfigError(
                f"{field}.validation_share={options.validation_share} leaves none of the "
                f"{len(apart)} pictures of {title} for {split}; expected another share, such as "
                f"{min(0.5, 4 / (len(apart) + 4)):.2g}"
            )


def _check_classes(spec: DataSpec, count: int, field: str, title: str) -> None:
    """Labels without names are rows of a table that the network makes, whether used or not."""
    if not spec.classes and spec.num_classes > max(_MOST_SPARE_CLASSES, count):
        raise ConfigError(
            f"{field}.path: labels of the {count} pictures of {title} go up to "
            f"{spec.num_classes - 1}; number the classes from 0 without gaps, or leave labels out "
            f"by {field}.labels='none'"
        )


def _report(annotations: Annotations, spec: DataSpec, rows: np.ndarray, title: str) -> None:
    """What was found, since much of it is guessed; and classes that training will never see."""
    carried = [f"{spec.num_classes} classes"] if spec.num_classes else []
    carried += ["captions"] if spec.text_length else []
    carried += [f"numbers {', '.join(spec.scalars)}"] if spec.scalars else []
    count = len(rows)
    _LOG.info("%s: %d training pictures, %s", title, count, ", ".join(carried) or "nothing else")
    if spec.num_classes and annotations.labels is not None:
        # One line, and no table of the classes: numbers may be few and far between.
        seen = np.unique(annotations.labels[rows])
        if missing := spec.num_classes - len(seen):
            gaps = np.flatnonzero(seen != np.arange(len(seen)))
            label = int(gaps[0]) if len(gaps) else len(seen)
            name = repr(spec.classes[label]) if spec.classes else label
            others = f" (nor {missing - 1} others)" if missing > 1 else ""
            _LOG.warning("%s: class %s has no picture in training%s", title, name, others)


def _shape(
    store: OwnStore, picture_view: View, threads: Workers, *, field: str, title: str
) -> tuple[int, int, int]:
    """Of the examples: as asked for, or as all pictures have it."""
    if picture_view.size is not None:
        return (picture_view.size, picture_view.size, picture_view.channels)
    count = len(store)
    chunks = np.split(np.arange(count, dtype=np.int64), np.arange(_CHUNK, count, _CHUNK))
    first: dict[tuple[int, int], int] = {}

    def sizes(rows: np.ndarray) -> dict[tuple[int, int], int]:
        found: dict[tuple[int, int], int] = {}
        for row, encoded in zip(rows.tolist(), store.read(rows)[0], strict=True):
            # What cannot be read is counted when it is decoded.
            if not isinstance(encoded, PictureError):
                try:
                    found.setdefault(size_of(encoded), row)
                except PictureError:
                    continue
        return found

    group = 4 * threads.count
    with progress(f"sizes of {title}", count) as advance:
        for start in range(0, len(chunks), group):
            some = chunks[start : start + group]
            for found in threads.run(sizes, some):
                first = found | first
            advance(sum(map(len, some)))
            if len(first) > 1:
                (one, row), (other, another) = list(first.items())[:2]
                raise ConfigError(
                    f"{field}.image_size is not set: {store.place(row)} is {one[0]} x {one[1]}, "
                    f"{store.place(another)} is {other[0]} x {other[1]}; set it, for example to 64"
                )
    if not first:
        raise DataError(f"{title}: none of its {count} pictures can be read")
    ((height, width),) = first
    return (height, width, picture_view.channels)
