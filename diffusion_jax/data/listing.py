"""Which files a path names: the pictures of a folder, or shards by a pattern. None is opened."""

from __future__ import annotations

import errno
import glob
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import PurePosixPath

from diffusion_jax.data.own import PATH_FLAG
from diffusion_jax.data.pictures import SUFFIXES
from diffusion_jax.errors import ConfigError, DataError, check_local

_LOG = logging.getLogger(__name__)
_BRACES = re.compile(r"\{([^{}]*)\}")


def check_path(path: str | os.PathLike[str], what: str) -> str:
    """`path` with `~` expanded.

    Raises:
      ConfigError: it is not set, or an address of an object store.
    """
    if not os.fspath(path):
        raise ConfigError(f"data.path is not set: name {what}, {PATH_FLAG}=DIR")
    check_local("data.path", path)
    return os.path.expanduser(os.fspath(path))


def pictures_under(root: str, known: frozenset[str] = frozenset()) -> list[str]:
    """Paths of all pictures below `root`, relative to it, with forward slashes, sorted.

    Symbolic links are followed. Files that are no pictures by their suffix, and what is hidden, is
    counted in the log.

    Args:
      root: the folder.
      known: names of further files in `root`, and suffixes of files anywhere, that are read as
        something else and need no mention.

    Raises:
      DataError: no such folder, one that cannot be read, no pictures in it, or a folder that links
        lead to twice.
    """
    if not os.path.isdir(root):
        why = "is no folder" if os.path.exists(root) else "does not exist"
        raise DataError(f"{root} {why}; name a folder of pictures: {PATH_FLAG}=DIR")
    found: list[str] = []
    others: Counter[str] = Counter()
    for relative in _files(root, others):
        suffix = os.path.splitext(relative)[1].lower()
        if suffix in SUFFIXES:
            found.append(relative)
        elif relative not in known and suffix not in known:
            others[suffix or "without suffix"] += 1
    counts = ", ".join(f"{count} {kind}" for kind, count in others.most_common(8))
    if not found:
        beside = f" (but: {counts})" if counts else ""
        raise DataError(
            f"{root} holds no pictures{beside}; expected files such as .jpg, .png or .webp: "
            f"{PATH_FLAG}=DIR"
        )
    if counts:
        _LOG.warning("%s: files that are no pictures are left aside: %s", root, counts)
    return sorted(found)


def _files(root: str, hidden: Counter[str]) -> Iterator[str]:
    """All files below `root` that are not hidden, as relative paths."""
    entered: dict[tuple[int, int], str] = {}
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        _enter(root, folder, entered)
        try:
            with os.scandir(os.path.join(root, folder)) as entries:
                for entry in entries:
                    relative = f"{folder}/{entry.name}" if folder else entry.name
                    if entry.name.startswith("."):
                        hidden["hidden"] += 1
                    elif _is_folder(entry, root):
                        waiting.append(relative)
                    else:
                        yield relative
        except OSError as error:
            raise DataError(
                f"{os.path.join(root, folder)} cannot be read: {error.strerror}"
            ) from error


def _enter(root: str, folder: str, entered: dict[tuple[int, int], str]) -> None:
    """Refuses a folder that was listed before: its pictures would count twice, or for ever."""
    path = os.path.join(root, folder)
    try:
        status = os.stat(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    before = entered.setdefault((status.st_dev, status.st_ino), folder)
    if before == folder:
        return
    if not before or PurePosixPath(before) in PurePosixPath(folder).parents:
        what = "leads back to a folder that it lies in"
    else:
        what = f"leads to the same folder as {os.path.join(root, before)}"
    raise DataError(f"{path}: this symbolic link {what}; remove it")


def _is_folder(entry: os.DirEntry[str], root: str) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise DataError(
                f"{entry.path}: this symbolic link leads to itself; remove it"
            ) from None
        raise


def files_at(path: str, suffix: str) -> list[str]:
    """The files that a path or pattern names, in order; of a folder those that end in `suffix`.

    Raises:
      DataError: there are none, or one that the pattern spells out is missing.
    """
    if os.path.isdir(path):
        found = sorted(glob.glob(os.path.join(glob.escape(path), f"*{suffix}")))
        if not found:
            raise DataError(f"{path} holds no {suffix} files; name others: {PATH_FLAG}=PATTERN")
        return found
    spelled = list(_braces(path))
    found = []
    for pattern in spelled:
        # A file may have brackets in its name.
        matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern))
        if not matches:
            raise DataError(
                f"{pattern} does not exist"
                + (f" (one of {len(spelled)} that {path} names)" if len(spelled) > 1 else "")
                + f"; name a {suffix} file, a folder of them or a pattern: {PATH_FLAG}=PATTERN"
            )
        found += matches
    return found


def _braces(pattern: str) -> Iterator[str]:
    """All spellings of `a{1..3}b{x,y}`; numbers keep the width of the longer end."""
    match = _BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    ends = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if ends is None:
        choices = match[1].split(",")
    else:
        width = max(map(len, ends.groups()))
        choices = [f"{number:0{width}d}" for number in range(int(ends[1]), int(ends[2]) + 1)]
        if not choices:
            raise ConfigError(
                f"data.path={pattern}: {match[0]} counts down; expected {{low..high}}"
            )
    for choice in choices:
        yield from _braces(pattern[: match.start()] + choice + pattern[match.end() :])
