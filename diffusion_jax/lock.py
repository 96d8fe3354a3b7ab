"""One run a workdir: two would delete each other's checkpoints in the making."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import time
import uuid
import weakref
from collections.abc import Iterator
from pathlib import Path

from diffusion_jax.errors import ConfigError

try:
    import fcntl
except ImportError:  # no such call on this system
    fcntl = None

LOCK_FILE = ".lock"
PATIENCE = 5.0
"""Seconds to wait for a run that is just ending."""

_held: weakref.WeakValueDictionary[str, Lock] = weakref.WeakValueDictionary()


class Lock:
    """A workdir held by this process, until `release`, the last reference or the process's end.

    The kernel lets go of it however the process ends. Within one process it is held once: who takes
    it again gets the same one.

    Attributes:
        token: stands in the file; who reads it there looks at the same folder.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.token = uuid.uuid4().hex
        os.ftruncate(descriptor, 0)
        holder = f"{self.token} process {os.getpid()} on {socket.gethostname()}\n"
        os.pwrite(descriptor, holder.encode(), 0)
        self.release = weakref.finalize(self, _release, path, descriptor)


def _release(path: Path, descriptor: int) -> None:
    if _is_file(path, descriptor):
        path.unlink(missing_ok=True)
    os.close(descriptor)


def _is_file(path: Path, descriptor: int) -> bool:
    """Whether what is open is still the file of that name: its last holder removes it."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def take(folder: Path) -> Lock:
    """Holds the workdir for this process; waits a moment for one that is just ending.

    Where the file system knows no locks, one line warns of it.

    Raises:
        ConfigError: another process holds it, or the folder cannot be written.
    """
    path = folder / LOCK_FILE
    name = str(path.resolve())
    if (mine := _held.get(name)) is not None and mine.release.alive:
        return mine
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise _unwritable(folder, error) from None
        if not _locked(folder, descriptor):
            holder = os.pread(descriptor, 500, 0).decode(errors="replace").partition(" ")[2].strip()
            os.close(descriptor)
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"workdir={folder} is in use by {holder or 'another process'}; wait for its "
                    "end, stop it or name a new workdir"
                )
            time.sleep(0.05)
        elif _is_file(path, descriptor):
            break
        else:
            os.close(descriptor)
    try:
        lock = Lock(path, descriptor)
    except OSError as error:
        os.close(descriptor)
        raise _unwritable(folder, error) from None
    _held[name] = lock
    return lock


@contextlib.contextmanager
def release_on_error(held: Lock | None) -> Iterator[None]:
    """Lets go of a lock when the block raises."""
    try:
        yield
    except BaseException:
        if held is not None:
            held.release()
        raise


def _locked(folder: Path, descriptor: int) -> bool:
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        print(
            f"Warning: workdir={folder} cannot be locked ({error.strerror}): see to it that no "
            "other run uses it",
            file=sys.stderr,
            flush=True,
        )
    return True


def _unwritable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"workdir={folder} cannot be written: {LOCK_FILE}: {error.strerror}")


def token_in(folder: Path) -> str:
    """The token of who holds the workdir, as seen from here; "" for none."""
    try:
        return (folder / LOCK_FILE).read_text().partition(" ")[0]
    except (OSError, ValueError):
        return ""
