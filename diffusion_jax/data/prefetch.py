"""Batches made ahead of the device by a background thread."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from diffusion_jax.errors import DataError, DiffusionJaxError

T = TypeVar("T")

_CLOSE_SECONDS = 10.0


class _End:
    """Put after the last item: the error that ended the production, or None."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class Prefetcher(Generic[T]):
    """Calls `make` at position, position + stride, ... in one thread, a few batches ahead.

    Iterating yields (position, item) in order. An error in the thread reaches the consumer at the
    position where it happened, after all good batches before it, and again at each later call.

    Args:
      make: item of a position, for example `loader.batch`; called in the background thread.
      position: first position, in examples.
      stride: examples from one item to the next: the global batch size.
      stop: position to end before; None for no end.
      depth: how many finished items may wait.
      transfer: applied to each item in the background thread, for example placement on devices.
    """

    def __init__(
        self,
        make: Callable[[int], Any],
        position: int,
        stride: int,
        *,
        stop: int | None = None,
        depth: int = 2,
        transfer: Callable[[Any], T] | None = None,
    ) -> None:
        if stride < 1 or depth < 1:
            raise ValueError(f"stride={stride}, depth={depth}: expected at least 1")
        self._make = make
        self._transfer = transfer
        self._positions = (position, stop, stride)
        self._queue: queue.Queue[tuple[int, Any] | _End] = queue.Queue(depth)
        self._closing = threading.Event()
        self._end: _End | None = None
        self._waited = 0.0
        self._thread = threading.Thread(target=self._run, name="prefetcher", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        position, stop, stride = self._positions
        error: BaseException | None = None
        try:
            while not self._closing.is_set() and (stop is None or position < stop):
                item = self._made(position)
                if self._transfer is not None:
                    item = self._transfer(item)
                self._put((position, item))
                position += stride
        except BaseException as raised:  # handed over, whatever it is: a thread must not die mutely
            error = raised
        self._put(_End(error))

    def _made(self, position: int) -> Any:
        """The item at `position`; a transfer that fails later is no fault of the data."""
        try:
            return self._make(position)
        except DiffusionJaxError:
            raise
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise DataError(f"the batch at position {position} failed: {reason}") from error

    def _put(self, item: tuple[int, Any] | _End) -> None:
        # A plain blocking put would never wake when the consumer leaves with the queue full.
        while not self._closing.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue

    def __iter__(self) -> Iterator[tuple[int, T]]:
        return self

    def __next__(self) -> tuple[int, T]:
        """The next (position, item); waits for it.

        Raises:
          DataError: the production failed; errors of the house and of the transfer pass as they
            are.
          StopIteration: `stop` is reached, or the prefetcher is closed.
        """
        if self._end is None:
            began = time.perf_counter()
            item = self._queue.get()
            self._waited += time.perf_counter() - began
            if not isinstance(item, _End):
                return item
            self._end = item
        if self._end.error is not None:
            raise self._end.error
        raise StopIteration

    @property
    def waited(self) -> float:
        """Seconds the consumer has spent waiting in `next` since the start."""
        return self._waited

    def close(self) -> None:
        """Stop the thread and drop what is waiting; later calls of `next` end at once.

        Waits for the batch in the making, but not for ever: a read that hangs must not keep a
        preempted run from leaving.
        """
        self._closing.set()
        self._thread.join(timeout=_CLOSE_SECONDS)
        while not self._queue.empty():
            self._queue.get_nowait()
        self._queue.put(_End(None))

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
