"""Encoded examples in NumPy files: what an autoencoder made of pictures, once for all runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from diffusion_jax.data.spec import Batch, DataSpec, Source, Split
from diffusion_jax.errors import ConfigError, DataError

_FIELD = "data.latents"
_PREPARE = "write them with python -m diffusion_jax.prepare --config=CONFIG"


def latents(
    split: Split,
    *,
    path: str = "",
    shape: Sequence[int] = (32, 32, 4),
    num_classes: int = 0,
    scale: float = 1.0,
    shift: float = 0.0,
) -> Source:
    """Latents `(stored - shift) * scale`, read from where they lie; nothing is held in memory.

    `path/train` and `path/validation` hold arrays `x*.npy` [n, *shape] of any float type and, with
    classes, as many `label*.npy` [n] of integers; parts are joined in the order of their names. The
    id of an example is its number, those of validation come after those of the training.

    Args:
      split: which of the two folders.
      path: the folder.
      shape: of one example, channels last.
      num_classes: 0 without labels.
      scale, shift: bring the values to about unit variance, as 0.18215 does for the autoencoder of
        Stable Diffusion (Rombach et al. 2022, appendix G).

    Raises:
      ConfigError: an option out of its range.
      DataError: no latents there, or they are not of this shape.
    """
    shape = tuple(shape)
    if len(shape) != 3 or min(shape) < 1:
        raise ConfigError(
            f"{_FIELD}.shape={shape}: expected (height, width, channels), such as (32, 32, 4)"
        )
    if num_classes < 0:
        raise ConfigError(f"{_FIELD}.num_classes={num_classes}: expected 0 or more")
    if not np.isfinite(shift):
        raise ConfigError(f"{_FIELD}.shift={shift}: expected a finite number, such as 0.0")
    if not np.isfinite(scale) or scale <= 0:
        raise ConfigError(f"{_FIELD}.scale={scale}: expected a positive number, such as 0.18215")
    spec = DataSpec(shape=shape, kind="latent", num_classes=num_classes, range=(-3.0, 3.0))
    parts = _parts(path, split, spec)
    first = 0 if split == "train" else sum(len(p.x) for p in _parts(path, "train", spec))
    return LatentSource(
        spec=spec,
        parts=parts,
        starts=np.cumsum([0, *(len(part.x) for part in parts)]),
        first_id=first,
        scale=scale,
        shift=shift,
    )


@dataclass(frozen=True, kw_only=True)
class Part:
    """One pair of files, mapped into memory: x [n, *shape], label [n] or None."""

    x: np.ndarray
    label: np.ndarray | None


def _parts(path: str, split: Split, spec: DataSpec) -> list[Part]:
    if not path:
        raise DataError(f"data.path={path!r}: expected a folder with latents; {_PREPARE}")
    folder = Path(os.path.expanduser(path)) / split
    files = sorted(folder.glob("x*.npy"))
    if not files:
        raise DataError(f"data.path={path}: no latents {split}/x*.npy there; {_PREPARE}")
    return [_part(file, spec) for file in files]


def _part(file: Path, spec: DataSpec) -> Part:
    x = _mapped(file)
    if x.shape[1:] != spec.shape or x.dtype.kind != "f" or not len(x):
        expected = ", ".join(map(str, spec.shape))
        raise DataError(
            f"{file}: {x.dtype} {list(x.shape)}; expected floats [n, {expected}] "
            f"(config.{_FIELD}.shape={spec.shape})"
        )
    if not spec.num_classes:
        return Part(x=x, label=None)
    beside = file.with_name(f"label{file.name.removeprefix('x')}")
    if not beside.is_file():
        raise DataError(
            f"{beside}: missing beside {file.name}; config.{_FIELD}.num_classes="
            f"{spec.num_classes} needs labels, 0 does not"
        )
    label = _mapped(beside)
    if label.shape != x.shape[:1] or label.dtype.kind not in "iu":
        raise DataError(
            f"{beside}: {label.dtype} {list(label.shape)}; expected integers [{len(x)}]"
        )
    low, high = int(label.min()), int(label.max())
    if low < 0 or high >= spec.num_classes:
        raise DataError(
            f"{beside}: labels from {low} to {high}; "
            f"config.{_FIELD}.num_classes={spec.num_classes} allows 0 to {spec.num_classes - 1}"
        )
    return Part(x=x, label=label)


def _mapped(file: Path) -> Any:
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{file} is no NumPy array or cut short: {error}") from error


@dataclass(frozen=True, kw_only=True)
class LatentSource:
    """Examples out of mapped files.

    Attributes:
      spec: of the examples.
      parts: the files.
      starts: number of the first example of each part, and of all at the end.
      first_id: id of the first example.
      scale, shift: see `latents`.
    """

    spec: DataSpec
    parts: Sequence[Part] = field(repr=False)
    starts: Int64[np.ndarray, " parts"]
    first_id: int
    scale: float
    shift: float

    def __len__(self) -> int:
        return int(self.starts[-1])

    def ids(self, indices: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """The numbers of the examples, counted through both splits."""
        return self.first_id + indices

    def fetch(
        self,
        indices: Int64[np.ndarray, " n"],
        positions: Int64[np.ndarray, " n"] | None = None,
    ) -> Batch:
        """Read the examples at `indices`; positions change nothing here.

        Raises:
          DataError: a value is not finite.
        """
        x = np.empty((len(indices), *self.spec.shape), np.float32)
        label = np.empty(len(indices), np.int32)
        which = np.searchsorted(self.starts, indices, side="right") - 1
        for number in np.unique(which):
            rows = np.flatnonzero(which == number)
            inside = indices[rows] - self.starts[number]
            part = self.parts[number]
            x[rows] = part.x[inside]
            if part.label is not None:
                label[rows] = part.label[inside]
        if not np.isfinite(x).all():
            bad = np.flatnonzero(~np.isfinite(x).reshape(len(x), -1).all(axis=1))
            raise DataError(f"latent number {indices[bad[0]]} is not finite; prepare them again")
        x = (x - np.float32(self.shift)) * np.float32(self.scale)
        conditioning = {"label": label} if self.spec.num_classes else {}
        return {"x": x, "conditioning": conditioning, "id": self.ids(indices)}
