"""Ids out of names, and who is held out: both stay when other examples come or go."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64

from diffusion_jax.data.hashing import uniform
from diffusion_jax.data.spec import Source
from diffusion_jax.errors import DataError

# The stream of draws that decide who is held out.
_HELD_OUT = 3
_CHUNK = 1 << 20


def normal(name: str) -> str:
    """A relative path, with forward slashes, as it is hashed: in NFC.

    macOS stores an accented letter as two code points where Linux keeps the one that was typed, so
    the same folder on both gives the same name.
    """
    return unicodedata.normalize("NFC", name)


class Names(Sequence[str]):
    """Names that are made when they are asked for, since a list of millions takes much memory."""

    def __init__(self, count: int, name: Callable[[int], str]) -> None:
        self._rows, self._name = range(count), name

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: Any) -> Any:
        return self._name(self._rows[row])


def stable_ids(names: Sequence[str]) -> Int64[np.ndarray, " n"]:
    """63 bits of BLAKE2b of each normalised name: never negative, the same on any machine.

    Raises:
      DataError: two names give the same id, which in practice means the same name.
    """
    ids = np.empty(len(names), np.int64)
    for row, name in enumerate(names):
        digest = hashlib.blake2b(
            normal(name).encode("utf-8", "surrogateescape"), digest_size=8
        ).digest()
        ids[row] = int.from_bytes(digest, "big") >> 1
    order = np.argsort(ids, kind="stable")
    same = np.flatnonzero(np.diff(ids[order]) == 0)
    if same.size:
        one, other = (names[int(order[same[0] + step])] for step in (0, 1))
        why = "the same name" if normal(one) == normal(other) else "the same id; rename one"
        raise DataError(f"{one!r} and {other!r} have {why} ({same.size} such pairs)")
    return ids


def held_out(ids: Int64[np.ndarray, " n"], share: float) -> Bool[np.ndarray, " n"]:
    """True for about `share` of the examples, each by its own id alone."""
    return uniform(_HELD_OUT, ids) < share


def fingerprint(source: Source) -> str:
    """A hash of the ids of all examples in their order, which decides what a batch holds."""
    digest, count = hashlib.blake2b(digest_size=16), len(source)
    for first in range(0, count, _CHUNK):
        ids = source.ids(np.arange(first, min(first + _CHUNK, count), dtype=np.int64))
        digest.update(np.ascontiguousarray(ids, "<i8").tobytes())
    return digest.hexdigest()
