"""SIGTERM before the runtime that agrees on it is up: the process leaves at once.

There is nothing to save yet, so it ends with the code that says so: start me again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from diffusion_jax.errors import EXIT_PREEMPTED

MESSAGE = (
    "Preempted: the machine is wanted back before the first step: what is saved stands; start me "
    "again\n"
)


@contextlib.contextmanager
def leaves_at_once() -> Iterator[None]:
    """SIGTERM inside the block ends the process with 75.

    After it SIGTERM belongs to who took it over inside, or ends the process if the block failed.
    Must be called from the main thread.
    """
    # A handler of Python's would wait until the main thread is back from the runtime, which itself
    # waits minutes for the other processes: this one only has the signal written to a thread.
    previous = signal.signal(signal.SIGTERM, lambda *_: None)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    earlier = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reading,), name="sigterm", daemon=True).start()
    try:
        yield
    except BaseException:
        signal.signal(signal.SIGTERM, previous)
        raise
    finally:
        signal.set_wakeup_fd(earlier)
        os.close(writing)


def _watch(reading: int) -> None:
    """Until the other end is closed."""
    while numbers := os.read(reading, 64):
        if signal.SIGTERM in numbers:
            os.write(2, MESSAGE.encode())
            os._exit(EXIT_PREEMPTED)
    os.close(reading)
