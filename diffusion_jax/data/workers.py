"""Threads that read and decode side by side; Pillow and file reads leave Python's lock free."""

from __future__ import annotations

import functools
import os
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")

_MOST = 16


class Workers:
    """A number of threads that wait for work as long as the process lives.

    They are daemons: a read that hangs must not keep a preempted run from leaving, as the pools of
    the standard library would.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._tasks: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        for number in range(count):
            name = f"decoder-{number}"
            threading.Thread(target=self._work, name=name, daemon=True).start()

    def run(self, function: Callable[[T], R], tasks: Sequence[T]) -> list[R]:
        """`function` of each task, in their order; the first task that failed, in that order,
        raises its error here. May be called from several threads, but not from a worker.
        """
        done: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()
        for number, task in enumerate(tasks):
            self._tasks.put((function, task, number, done))
        results: list[Any] = [None] * len(tasks)
        failed: dict[int, BaseException] = {}
        for _ in tasks:
            number, results[number], error = done.get()
            if error is not None:
                failed[number] = error
        if failed:
            raise failed[min(failed)]
        return results

    def _work(self) -> None:
        while True:
            function, task, number, done = self._tasks.get()
            try:
                done.put((number, function(task), None))
            except BaseException as error:  # handed over: a thread must not die mutely
                done.put((number, None, error))
            # A waiting thread must not keep the last batch alive.
            del function, task, done


def workers(count: int | None = None) -> Workers:
    """`count` threads, shared by all that ask for as many; None: one a core, at most 16."""
    return _shared(count if count is not None else min(cores(), _MOST))


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def _shared(count: int) -> Workers:
    return Workers(count)
