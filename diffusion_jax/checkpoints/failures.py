"""One readable line for a save that the storage refused."""

from __future__ import annotations

import errno
import logging
import os
import re
from typing import Any

from diffusion_jax.errors import Aborted, ConfigError

# What stays wrong however often the run is started again.
LASTING = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EFBIG,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}


def raise_readable(error: Exception, directory: Any, steps: list[int]) -> None:
    """Raises ConfigError or Aborted when `error` comes from the storage; returns otherwise."""
    code = _error_number(error)
    if code is None:
        return
    kind = ConfigError if code in LASTING else Aborted
    raise kind(
        f"checkpoint in {str(directory)!r} could not be written: {os.strerror(code)}; earlier "
        f"steps {steps} are untouched; expected a directory with room and permission to write"
    ) from error


def _error_number(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os_error_code='(\d+)'", str(error))  # as TensorStore reports it
    return int(found[1]) if found else None


def origin(error: BaseException) -> str:
    """One line for the error that another was raised from: it knows file and array."""
    while error.__cause__ is not None:
        error = error.__cause__
    said = str(error).splitlines()[:1]
    if isinstance(error, OSError | ValueError) and said:
        return said[0]
    return ": ".join([type(error).__name__, *said])


def hide_traces_of_writing_threads() -> None:
    """Orbax logs each failed thread with its stack; the error itself is raised by save or wait."""
    logger = logging.getLogger("absl")
    if _is_no_trace_of_orbax not in logger.filters:
        logger.addFilter(_is_no_trace_of_orbax)


def _is_no_trace_of_orbax(record: logging.LogRecord) -> bool:
    return not (record.exc_info and os.path.join("orbax", "checkpoint") in record.pathname)
