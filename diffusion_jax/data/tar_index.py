"""Where the members of tar shards lie, by reading their headers once."""

from __future__ import annotations

import os
import tarfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np
from jaxtyping import Int32, Int64

from diffusion_jax.data.annotations import Strings
from diffusion_jax.data.pictures import SUFFIXES
from diffusion_jax.data.workers import Workers
from diffusion_jax.errors import DataError

PARTS = ("picture", "cls", "txt", "json")
"""What a sample may consist of: one member for each."""

_BLOCK = 512
_CHUNK = 1 << 20
# Members between two moments at which tarfile's own list of them, a kilobyte each, is emptied.
_FORGET = 1000


@dataclass(kw_only=True)
class _Shard:
    """Samples of one shard in the making; see `Samples`."""

    path: str
    rows: dict[str, int] = field(default_factory=dict)
    offsets: dict[str, array[int]] = field(default_factory=lambda: {p: array("q") for p in PARTS})
    sizes: dict[str, array[int]] = field(default_factory=lambda: {p: array("q") for p in PARTS})
    others: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The n samples of some shards, in the order in which they lie.

    Attributes:
      paths: of the shards.
      shards: int32 [n], in which shard each sample lies.
      keys: names of the samples: of their members up to the first dot of the file name.
      offsets, sizes: int64 [n] in bytes, of each part of `PARTS`; -1 where a sample has it not.
      others: kinds of members that are none of these parts, and how many.
    """

    paths: tuple[str, ...]
    shards: Int32[np.ndarray, " n"]
    keys: Strings
    offsets: dict[str, Int64[np.ndarray, " n"]]
    sizes: dict[str, Int64[np.ndarray, " n"]]
    others: Counter[str]

    def name(self, row: int) -> str:
        """Shard and key of a sample, the same wherever the shard lies."""
        key = self.keys[row].decode("utf-8", "surrogateescape")
        return f"{os.path.basename(self.paths[self.shards[row]])}/{key}"

    def has(self, part: str) -> bool:
        """Whether any sample has this part."""
        return bool((self.offsets[part] >= 0).any())

    def contents(self, part: str) -> Iterator[tuple[int, bytes]]:
        """(row, content) of this part of every sample.

        Raises:
          DataError: a sample does not have it.
        """
        without = np.flatnonzero(self.offsets[part] < 0)
        if len(without):
            raise DataError(
                f"{len(without)} of {len(self.keys)} samples have no {part}, "
                f"the first {self.name(int(without[0]))}; expected one in each"
            )
        for shard, path in enumerate(self.paths):
            rows = np.flatnonzero(self.shards == shard)
            offsets, sizes = (table[part][rows].tolist() for table in (self.offsets, self.sizes))
            yield from zip(
                rows.tolist(), read_members(path, zip(offsets, sizes, strict=True)), strict=True
            )


def read_members(path: str, places: Iterable[tuple[int, int]]) -> Iterator[bytes]:
    """What stands at each (offset, size) of a file.

    Raises:
      DataError: the file cannot be read, or has become shorter.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            for offset, size in places:
                file.seek(offset)
                content = file.read(size)
                if len(content) < size:
                    raise DataError(f"{path} ends before byte {offset + size}: it is cut short")
                yield content
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def read_index(
    paths: Sequence[str], suffix: str, threads: Workers, advance: Callable[[int], None]
) -> Samples:
    """The samples of all shards.

    Args:
      paths: of the shards.
      suffix: of the members that are the pictures, such as "jpg"; "" for any known.
      threads: read shards side by side.
      advance: called with the number of shards done.

    Raises:
      DataError: a shard is missing, cut short, compressed or otherwise unreadable; a sample has no
        picture, or two members of a kind; or there are no samples.
    """

    def one(path: str) -> tuple[_Shard, Strings]:
        index = _index_shard(path, suffix)
        advance(1)
        keys = Strings(key.encode("utf-8", "surrogateescape") for key in index.rows)
        # The keys of all shards as a dictionary would be the largest thing in memory.
        index.rows.clear()
        return index, keys

    found, keys = zip(*threads.run(one, paths), strict=True)
    samples = Samples(
        paths=tuple(paths),
        shards=np.repeat(np.arange(len(found), dtype=np.int32), [len(part) for part in keys]),
        keys=Strings(part[row] for part in keys for row in range(len(part))),
        offsets={part: _joined([shard.offsets[part] for shard in found]) for part in PARTS},
        sizes={part: _joined([shard.sizes[part] for shard in found]) for part in PARTS},
        others=sum((shard.others for shard in found), Counter()),
    )
    if not samples.has("picture"):
        kinds = ", ".join(f"{count} {kind}" for kind, count in samples.others.most_common(8))
        raise DataError(
            f"{paths[0]} and the {len(paths) - 1} shards after it hold no pictures"
            + (f" (but: {kinds})" if kinds else "")
            + (f" that end in .{suffix.lstrip('.')}" if suffix else "")
        )
    without = np.flatnonzero(samples.offsets["picture"] < 0)
    if len(without):
        raise DataError(
            f"{len(without)} of {len(samples.keys)} samples have no picture, "
            f"the first {samples.name(int(without[0]))}"
        )
    return samples


def _joined(arrays: Sequence[array[int]]) -> Int64[np.ndarray, " n"]:
    return np.concatenate(
        [np.frombuffer(a, np.int64) if a else np.empty(0, np.int64) for a in arrays]
    )


def _index_shard(path: str, suffix: str) -> _Shard:
    index = _Shard(path=path)
    try:
        with open(path, "rb") as file:
            _check_start(file.read(_BLOCK), path)
            file.seek(0)
            end = 0
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for number, member in enumerate(tar):
                    end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                    if member.isreg():
                        _add(index, member, suffix)
                    elif not member.isdir():
                        # GNU tar writes a file that it meets twice as a link to the first.
                        index.others["links or special files"] += 1
                    if number % _FORGET == 0:
                        tar.members = []  # pyright: ignore
            _check_end(file, path, end)
            if not end:
                raise DataError(f"{path} has no members; remove it, or write it again")
    except tarfile.TarError as error:
        raise DataError(f"{path} is damaged or cut short ({error})") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    return index


def _add(index: _Shard, member: tarfile.TarInfo, suffix: str) -> None:
    folder, _, base = member.name.removeprefix("./").rpartition("/")
    stem, _, kind = base.partition(".")
    kind = kind.lower()
    if not stem:
        # What begins with a dot is hidden; macOS puts such companions beside every file.
        index.others["hidden"] += 1
        return
    is_picture = kind == suffix.lower().lstrip(".") if suffix else f".{kind}" in SUFFIXES
    part = "picture" if is_picture else kind
    if part not in PARTS:
        index.others[kind or "without suffix"] += 1
        return
    key = f"{folder}/{stem}" if folder else stem
    row = index.rows.setdefault(key, len(index.rows))
    if row == len(index.offsets[part]):
        for name in PARTS:
            index.offsets[name].append(-1)
            index.sizes[name].append(-1)
    if index.offsets[part][row] >= 0:
        hint = "; choose one by image_suffix" if is_picture and not suffix else ""
        raise DataError(f"{index.path}: the sample {key!r} has two members of kind {part!r}{hint}")
    index.offsets[part][row] = member.offset_data
    index.sizes[part][row] = member.size


def _check_start(head: bytes, path: str) -> None:
    if not head:
        raise DataError(f"{path} is empty (0 bytes); expected a tar file")
    if head[:2] == b"\x1f\x8b" or head[:4] in (b"\x28\xb5\x2f\xfd", b"BZh9", b"\xfd7zX"):
        raise DataError(
            f"{path} is compressed, which allows no random access; unpack it: "
            f"gunzip (or unzstd, bunzip2, unxz) {os.path.basename(path)}"
        )


def _check_end(file: BinaryIO, path: str, end: int) -> None:
    """A tar file ends in blocks of zeros; one that was cut between two members lacks them."""
    size = os.fstat(file.fileno()).st_size
    file.seek(end)
    if end > size or file.read(_BLOCK) != bytes(_BLOCK):
        raise DataError(
            f"{path} is cut short: its members end at byte {end}, it has {size} bytes and no end "
            "mark; copy it again"
        )
    while rest := file.read(_CHUNK):
        if rest.strip(b"\0"):
            raise DataError(
                f"{path} goes on after its end mark at byte {end}, as tar files do that were put "
                "together with cat; unpack it with tar -i, and pack it again"
            )
