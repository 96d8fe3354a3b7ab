"""Pictures decoded once and held in memory as bytes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int64, Shaped, UInt8

from diffusion_jax.data.annotations import Conditioning
from diffusion_jax.data.arrays import ArraySource, gathered
from diffusion_jax.data.picture_source import PictureSource, place
from diffusion_jax.data.pictures import PictureError
from diffusion_jax.data.progress import progress
from diffusion_jax.data.spec import Batch, DataSpec, Source
from diffusion_jax.errors import DataError

_LOG = logging.getLogger(__name__)
_CHUNK = 128


@dataclass(frozen=True, kw_only=True)
class FrameSource:
    """Pictures in memory, higher or wider than the window that a batch shows of them.

    Attributes:
      spec: of the examples.
      frames: n arrays of uint8 [height, width, channels].
      example_ids: int64 [n].
      shown_ids: int64 [n], see `ArraySource`.
      conditioning: entries of a batch's conditioning, of all n examples.
    """

    spec: DataSpec
    frames: list[UInt8[np.ndarray, "_h _w _c"]]
    example_ids: Int64[np.ndarray, " n"]
    shown_ids: Int64[np.ndarray, " n"]
    conditioning: Mapping[str, Shaped[np.ndarray, "n ..."]]

    def __len__(self) -> int:
        return len(self.frames)

    def ids(self, indices: Int64[np.ndarray, " m"]) -> Int64[np.ndarray, " m"]:
        """The ids of the examples at `indices`."""
        return self.example_ids[indices]

    def fetch(
        self,
        indices: Int64[np.ndarray, " m"],
        positions: Int64[np.ndarray, " m"] | None = None,
    ) -> Batch:
        """A window of each example at `indices`: random by the positions, or the middle."""
        x = np.empty((len(indices), *self.spec.shape), np.float32)
        ids = self.shown_ids[indices]
        frames = [self.frames[index] for index in indices.tolist()]
        place(frames, ids, positions, x, np.arange(len(indices)))
        return {"x": x, "conditioning": gathered(self.conditioning, indices), "id": ids}


def held_if_it_fits(source: PictureSource, memory: int, title: str) -> Source:
    """All of `source` decoded, if that takes at most `memory` bytes; else `source` itself.

    Raises:
      DataError: more pictures than allowed cannot be read, or what holds them is damaged.
    """
    fixed = len(source) * int(np.prod(source.spec.shape))
    if fixed > memory:
        return source
    began = time.perf_counter()
    errors: dict[int, PictureError] = {}
    # Windows are chosen later, out of frames of different sizes.
    windowed = source.view.crop == "random"
    pixels: Any = (
        [None] * len(source) if windowed else np.empty((len(source), *source.spec.shape), np.uint8)
    )

    def decode(rows: Int64[np.ndarray, " m"]) -> tuple[int, Conditioning]:
        pictures, conditioning = source.decoded(rows)
        size = 0
        for row, picture in zip(rows.tolist(), pictures, strict=True):
            if isinstance(picture, PictureError):
                errors[row] = picture
            else:
                pixels[row] = picture
                size += picture.nbytes
        return size, {name: _small(name, values) for name, values in conditioning.items()}

    size, parts = _in_parallel(source, decode, memory, title)
    if size > memory:
        _LOG.info("%s: more than memory=%d bytes; decoded when asked for", title, memory)
        return source
    used = _replacements(source, errors)
    for row in errors:
        pixels[row] = pixels[used[row]]
    conditioning = {name: np.concatenate([part[name] for part in parts])[used] for name in parts[0]}
    seconds = time.perf_counter() - began
    _LOG.info("%s: %d pictures, %.0f MB, decoded in %.1f s", title, len(used), size / 1e6, seconds)
    common: Any = {
        "spec": source.spec,
        "example_ids": source.example_ids,
        "shown_ids": source.example_ids[used],
        "conditioning": conditioning,
    }
    if windowed:
        return FrameSource(frames=pixels, **common)
    return ArraySource(x=pixels, **common)


def _small(name: str, values: np.ndarray) -> np.ndarray:
    # Tokens of captions are at most 256, and there are many.
    return values.astype(np.int16) if name == "text" else values


def _in_parallel(
    source: PictureSource,
    decode: Callable[[np.ndarray], tuple[int, Conditioning]],
    memory: int,
    title: str,
) -> tuple[int, list[Conditioning]]:
    """Runs `decode` over all rows, with a progress line, until they take more than `memory`."""
    chunks = np.split(
        np.arange(len(source), dtype=np.int64), np.arange(_CHUNK, len(source), _CHUNK)
    )
    size, parts, group = 0, [], 4 * source.workers.count
    with progress(f"decoding {title}", len(source)) as advance:
        for first in range(0, len(chunks), group):
            some = chunks[first : first + group]
            for bytes_, conditioning in source.workers.run(decode, some):
                size += bytes_
                parts.append(conditioning)
            advance(sum(map(len, some)))
            if size > memory:
                break
    return size, parts


def _replacements(
    source: PictureSource, errors: Mapping[int, PictureError]
) -> Int64[np.ndarray, " n"]:
    """The index that stands at each place: its own, or the next one that can be read."""
    places = {source.store.place(row): str(errors[row]) for row in sorted(errors)}
    source.faults.add_all(places)
    used = np.arange(len(source), dtype=np.int64)
    if errors:
        readable = np.setdiff1d(used, np.array(list(errors)))
        if not readable.size:
            raise DataError(f"none of the {len(source)} pictures can be read; {next(iter(places))}")
        for row in errors:
            used[row] = readable[np.searchsorted(readable, row) % len(readable)]
    return used
