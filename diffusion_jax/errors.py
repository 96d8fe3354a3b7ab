"""Errors that a user can mend, each with the exit code that the launch scripts rely on.

A message is one line: the field or argument, the value, what was expected and the nearest valid
choice. Doors print it without a traceback and leave with `exit_code`.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from collections.abc import Iterable, Iterator

EXIT_OK = 0
EXIT_BAD_DATA = 65
EXIT_ABORTED = 70
EXIT_PREEMPTED = 75
EXIT_BAD_CONFIG = 78


class DiffusionJaxError(Exception):
    """Base of all errors with an exit code of their own."""

    exit_code = EXIT_ABORTED


class ConfigError(DiffusionJaxError, ValueError):
    """A config, flag, checkpoint or workdir that cannot work as given. Never restart."""

    exit_code = EXIT_BAD_CONFIG


class DataError(DiffusionJaxError):
    """Data that is missing, unreadable or of the wrong form."""

    exit_code = EXIT_BAD_DATA


class Aborted(DiffusionJaxError):
    """The run stopped itself (non-finite loss, hang). Start again, but count it."""

    exit_code = EXIT_ABORTED


class Preempted(DiffusionJaxError):
    """The machine is wanted back and the state is saved. Start again."""

    exit_code = EXIT_PREEMPTED


def nearest(value: str, known: Iterable[str]) -> str | None:
    """The known name closest to `value`, or None when nothing resembles it."""
    matches = difflib.get_close_matches(str(value), list(known), n=1, cutoff=0.5)
    return matches[0] if matches else None


def unknown_name(field: str, value: str, known: Iterable[str]) -> str:
    """One line for a name that is not in `known`, with a suggestion where one is near."""
    known = sorted(known)
    close = nearest(value, known)
    hint = f" (did you mean {close!r}?)" if close else ""
    return f"{field}={value!r} is unknown{hint}; known: {', '.join(known)}"


def check_local(field: str, folder: str | os.PathLike[str]) -> None:
    """Refuses the address of an object store, which would become a local folder called `gs:`.

    Raises:
        ConfigError: `folder` begins with a scheme.
    """
    # `Path` makes one slash of two.
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", os.fspath(folder)):
        raise ConfigError(
            f"{field}={os.fspath(folder)}: object stores are not supported yet; mount it or name "
            "a local folder"
        )


@contextlib.contextmanager
def section(field: str) -> Iterator[None]:
    """Turns a ValueError or TypeError of a constructor into a ConfigError naming the section."""
    try:
        yield
    except DiffusionJaxError:
        raise
    except (ValueError, TypeError) as error:
        named_already = str(error).startswith(field)
        raise ConfigError(
            f"config.{error}" if named_already else f"config.{field}: {error}"
        ) from error


@contextlib.contextmanager
def named(prefix: str) -> Iterator[None]:
    """Completes the field that a ConfigError of the rooms below begins with."""
    try:
        yield
    except ConfigError as error:
        if str(error).startswith("config."):
            raise
        raise ConfigError(f"{prefix}{error}") from error
