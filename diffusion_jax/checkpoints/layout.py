"""What lies in a checkpoint directory: whole steps, torn ones, and what else is there.

A step is written into `<step>.orbax-checkpoint-tmp*` and renamed when it is complete, so that a
process killed in a save leaves only a temporary directory.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from diffusion_jax.errors import ConfigError

STATE, METADATA, QUARANTINE = "state", "metadata", "quarantine"
TEMPORARY = ".orbax-checkpoint-tmp"
PROBE = ".write-test"

logger = logging.getLogger(__name__)


def complete_steps(directory: epath.Path) -> list[int]:
    """Steps that can be restored, ascending.

    Raises:
      ConfigError: if it cannot be seen what is there; a step behind closed doors is no torn one.
    """
    return sorted(step for step, whole in _numbered(directory).items() if whole)


@contextlib.contextmanager
def _legible(path: epath.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"checkpoint path {str(error.filename or path)!r} cannot be read: {error.strerror}; "
            f"expected permission to read it"
        ) from error


def _is_there(path: epath.Path) -> bool:
    """Whether the path exists; `exists` would also say no for want of permission."""
    with _legible(path):
        try:
            path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True


def _numbered(directory: epath.Path) -> dict[int, bool]:
    """Every finished step directory, and whether the parts of a checkpoint are in it."""
    if not _is_there(directory):
        return {}
    with _legible(directory):
        found = list(ocp.path.step.standard_name_format().find_all(directory))
    return {
        entry.step: _is_there(directory / str(entry.step) / STATE / "_METADATA")
        and _is_there(directory / str(entry.step) / METADATA / METADATA)
        for entry in found
    }


def prepare_directory(directory: epath.Path) -> None:
    """Creates the directory, checks that it can be written and sets incomplete steps aside.

    Raises:
      ConfigError: if it cannot be created, read or written, or holds something but nothing
        restorable.
    """
    if jax.process_index() == 0:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / PROBE).write_text("")
            (directory / PROBE).unlink()
        except OSError as error:
            raise ConfigError(
                f"checkpoints directory {str(directory)!r} cannot be written: {error.strerror}; "
                f"expected a directory with room and permission to write"
            ) from error
    check_restorable(directory)
    if jax.process_index() == 0:
        for step, whole in _numbered(directory).items():
            if not whole:
                _set_aside(directory, step)


def check_restorable(directory: epath.Path) -> None:
    """Raises ConfigError when something is there but no step that could be restored.

    What a process killed in its first save leaves behind does not count.
    """
    if not _is_there(directory) or complete_steps(directory):
        return
    with _legible(directory):
        names = sorted(path.name for path in directory.iterdir())
    rest = [name for name in names if TEMPORARY not in name and name != PROBE]
    if rest:
        raise ConfigError(
            f"checkpoints directory {str(directory)!r} holds {', '.join(rest[:5])} but no "
            f"checkpoint that can be restored; expected an empty directory or a whole checkpoint"
        )


def _set_aside(directory: epath.Path, step: int) -> None:
    target = directory / QUARANTINE / str(step)
    number = 1
    with _legible(directory):
        target.parent.mkdir(exist_ok=True)
        while target.exists():
            target, number = target.parent / f"{step}-{number}", number + 1
        (directory / str(step)).rename(target)
    logger.warning("checkpoint %s is incomplete: moved to %s", directory / str(step), target)


def read_metadata(directory: epath.Path, step: int) -> dict[str, Any]:
    """The JSON object stored with a step."""
    path = directory / str(step) / METADATA / METADATA
    try:
        metadata = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"checkpoint metadata {str(path)!r} cannot be read: {error}") from error
    if not isinstance(metadata, dict):
        raise ConfigError(f"checkpoint metadata {str(path)!r} holds {metadata!r}, no JSON object")
    return metadata
