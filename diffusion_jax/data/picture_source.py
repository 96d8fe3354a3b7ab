"""Encoded pictures with random access as a source: decoded in threads when they are asked for.

A picture that cannot be read is named in the log and counted; past a limit it ends the run. Below
the limit the next readable one in the order of the data set stands in its place, so that the number
of examples, and with it the order of a run, depends neither on a damaged file nor on the process
that met it, nor on whether the set is held in memory.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int64, UInt8

from diffusion_jax.data.annotations import Conditioning
from diffusion_jax.data.arrays import from_uint8
from diffusion_jax.data.pictures import PictureError, View
from diffusion_jax.data.spec import Batch, DataSpec
from diffusion_jax.data.transforms import windows
from diffusion_jax.data.workers import Workers
from diffusion_jax.errors import DataError

_LOG = logging.getLogger(__name__)
# Tasks a worker and batch: more even out pictures of unequal cost, but each has to be handed over.
_TASKS = 2


@runtime_checkable
class Store(Protocol):
    """Where encoded pictures lie; safe to call from threads."""

    def __len__(self) -> int:
        """Number of pictures."""
        ...

    def read(
        self, indices: Int64[np.ndarray, " n"]
    ) -> tuple[list[bytes | PictureError], Conditioning]:
        """The files of the pictures at `indices`, or why there is none, and what comes with them.

        Raises:
          DataError: what holds many pictures is damaged.
        """
        ...

    def place(self, index: int) -> str:
        """The file, and the place in it, of a picture: for messages."""
        ...


class Faults:
    """Counts the pictures that cannot be read, each once, and names them in the log."""

    def __init__(self, limit: int, title: str) -> None:
        self._limit, self._title = limit, title
        self._known: dict[str, str] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._known)

    def add(self, place: str, reason: object) -> None:
        """Notes one.

        Raises:
          DataError: there are more than the limit.
        """
        with self._lock:
            if place in self._known:
                return
            self._known[place] = str(reason)
            self._check()
            _LOG.warning(
                "unreadable, replaced by the next in order (number %d, max_unreadable=%d): %s: %s",
                *(len(self._known), self._limit, place, reason),
            )

    def add_all(self, found: dict[str, str]) -> None:
        """Notes many at once, so that a message can tell how many there are in all."""
        with self._lock:
            self._known |= found
            self._check()
            for place, reason in found.items():
                _LOG.warning("unreadable, replaced by the next in order: %s: %s", place, reason)

    def _check(self) -> None:
        if len(self._known) > self._limit:
            shown = "; ".join(f"{place}: {why}" for place, why in list(self._known.items())[:3])
            count = len(self._known)
            raise DataError(
                f"{count} unreadable picture{'s' * (count > 1)} in {self._title}, "
                f"max_unreadable={self._limit}: {shown}{'; ...' if count > 3 else ''}"
            )


@dataclass(frozen=True, kw_only=True)
class PictureSource:
    """Pictures that are read and decoded when they are asked for.

    Attributes:
      spec: of the examples.
      store: of the encoded pictures.
      example_ids: int64 [n].
      view: how they become arrays.
      faults: counts what cannot be read.
      workers: decode.
    """

    spec: DataSpec
    store: Store
    example_ids: Int64[np.ndarray, " n"] = field(repr=False)
    view: View
    faults: Faults
    workers: Workers

    def __len__(self) -> int:
        return len(self.example_ids)

    def ids(self, indices: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """The ids of the examples at `indices`, whether or not they can be read."""
        return self.example_ids[indices]

    def fetch(
        self,
        indices: Int64[np.ndarray, " n"],
        positions: Int64[np.ndarray, " n"] | None = None,
    ) -> Batch:
        """Read and decode the examples at `indices`; random windows follow the positions.

        Raises:
          DataError: more pictures than allowed cannot be read, or what holds them is damaged.
        """
        x = np.empty((len(indices), *self.spec.shape), np.float32)
        # Neighbours in the files are read together.
        order = np.argsort(indices, kind="stable")
        tasks = np.array_split(order, min(len(indices), _TASKS * self.workers.count) or 1)

        def fill(rows: Int64[np.ndarray, " m"]) -> tuple[Int64[np.ndarray, " m"], Conditioning]:
            frames, used, conditioning = self._readable(indices[rows])
            ids = self.example_ids[used]
            at = None if positions is None else positions[rows]
            place(frames, ids, at, x, rows)
            return ids, conditioning

        parts = self.workers.run(fill, tasks)
        ids = np.empty(len(indices), np.int64)
        ids[order] = np.concatenate([part[0] for part in parts])
        conditioning: Conditioning = {}
        for name in parts[0][1]:
            values = np.concatenate([part[1][name] for part in parts])
            conditioning[name] = np.empty_like(values)
            conditioning[name][order] = values
        return {"x": x, "conditioning": conditioning, "id": ids}

    def decoded(
        self, indices: Int64[np.ndarray, " n"]
    ) -> tuple[list[UInt8[np.ndarray, "_h _w _c"] | PictureError], Conditioning]:
        """The pixels of each picture, or why there are none, and what comes with them."""
        encoded, conditioning = self.store.read(indices)
        return [self._decode(picture) for picture in encoded], conditioning

    def _decode(self, encoded: bytes | PictureError) -> np.ndarray | PictureError:
        if isinstance(encoded, PictureError):
            return encoded
        try:
            pixels = self.view.decode(encoded)
        except PictureError as error:
            return error
        if self.view.crop == "center" and pixels.shape != self.spec.shape:
            height, width = pixels.shape[:2]
            expected = f"{self.spec.shape[0]} x {self.spec.shape[1]}"
            return PictureError(f"it is {height} x {width}; expected {expected}")
        return pixels

    def _readable(
        self, indices: Int64[np.ndarray, " n"]
    ) -> tuple[list[np.ndarray], Int64[np.ndarray, " n"], Conditioning]:
        pictures, conditioning = self.decoded(indices)
        frames, used = [], indices.copy()
        for row, picture in enumerate(pictures):
            if isinstance(picture, PictureError):
                used[row], picture, entries = self._next_readable(int(indices[row]), picture)
                for name, values in entries.items():
                    conditioning[name][row] = values[0]
            frames.append(picture)
        return frames, used, conditioning

    def _next_readable(
        self, first: int, error: PictureError
    ) -> tuple[int, np.ndarray, Conditioning]:
        self.faults.add(self.store.place(first), error)
        for index in (*range(first + 1, len(self)), *range(first)):
            (picture,), conditioning = self.decoded(np.array([index], np.int64))
            if not isinstance(picture, PictureError):
                return index, picture, conditioning
            self.faults.add(self.store.place(index), picture)
        raise DataError(f"none of the {len(self)} pictures can be read; {error}")


def place(
    frames: list[UInt8[np.ndarray, "_h _w _c"]],
    ids: Int64[np.ndarray, " n"],
    positions: Int64[np.ndarray, " n"] | None,
    x: Float32[np.ndarray, "batch height width channels"],
    rows: Int64[np.ndarray, " n"],
) -> None:
    """Write a window of each frame into its row of `x`, as float32 in [-1, 1]."""
    height, width = x.shape[1:3]
    spare = np.array([(f.shape[0] - height, f.shape[1] - width) for f in frames], np.int64)
    corners = windows(ids, positions, spare) if spare.any() else spare
    for row, frame, (top, left) in zip(rows, frames, corners.tolist(), strict=True):
        x[row] = from_uint8(frame[top : top + height, left : left + width])
