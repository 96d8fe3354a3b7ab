"""Where numbers and pictures go: `metrics.jsonl` always, TensorBoard where TensorFlow is.

clu's writers import TensorFlow, which takes seconds: it happens in a thread of its own while the
first step compiles, and only there is TensorFlow touched. Without TensorFlow one warning is given
and `metrics.jsonl` alone is written.
"""

from __future__ import annotations

import functools
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

METRICS_FILE = "metrics.jsonl"
EVENTS = "events.out.tfevents.*"
CLOSE_TIMEOUT = 60.0
"""Seconds for the last events: a file system that hangs must not hold a run that leaves."""


class Writer:
    """Writes to nowhere; what processes other than 0 use."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes named numbers."""

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes a picture, uint8 [H, W, 3]."""

    def hparams(self, values: Mapping[str, Any]) -> None:
        """Writes the flat config, where it was not written before."""

    def flush(self) -> None:
        """Brings everything to disk."""

    def close(self) -> None:
        """Flushes and ends."""


class JsonlWriter(Writer):
    """One JSON row per call: `{"step": n, name: value, ...}`.

    On a resume, rows past the restored step are cut: they will be written again.
    """

    def __init__(self, workdir: str | Path, start_step: int) -> None:
        self._path = Path(workdir) / METRICS_FILE
        if self._path.exists():
            _cut_rows(self._path, start_step)
        self._file = self._path.open("a")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        row = {"step": step, **{name: _json_number(v) for name, v in values.items()}}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self.flush()
        self._file.close()


def _json_number(value: float) -> float | str:
    """JSON knows no NaN: non-finite numbers are written as strings that `float` reads back."""
    value = float(value)
    return value if np.isfinite(value) else str(value)


def _cut_rows(path: Path, last_step: int) -> None:
    """Keeps the whole rows up to `last_step`; a last one torn by a kill is dropped.

    Other rows that cannot be read end no training: one line says which are dropped.
    """
    kept, damaged = [], []
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        step = _step_of(line)
        if step is None and number < len(lines):
            damaged.append(str(number))
        elif step is not None and step <= last_step:
            kept.append(line + b"\n")
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(b"".join(kept))
    temporary.replace(path)
    if damaged:
        print(
            f"Warning: {path}: no rows of metrics in line {', '.join(damaged)}: dropped",
            file=sys.stderr,
            flush=True,
        )


def _step_of(line: bytes) -> int | None:
    """None for what is no row of ours."""
    try:
        row = json.loads(line)
    except ValueError:  # also of what is no UTF-8
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return step if isinstance(step, int) else None


class TensorBoardWriter(Writer):
    """TensorBoard events through clu, written by a thread that imports TensorFlow on its own.

    On a resume TensorBoard is told to forget the events past the restored step: they will be
    written again. The flat config goes into a workdir once, since every copy is shown as a run.
    """

    def __init__(self, workdir: str | Path, start_step: int) -> None:
        self._first = not any(Path(workdir).glob(EVENTS))
        self._start_step = start_step
        self._queue: queue.Queue[Callable[[Any], None] | None] = queue.Queue()
        self._thread = threading.Thread(
            target=self._run, args=(str(workdir),), name="tensorboard", daemon=True
        )
        self._thread.start()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        copy = dict(values)
        self._queue.put(lambda writer: writer.write_scalars(step, copy))

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        self._queue.put(lambda writer: writer.write_images(step, {name: image[None]}))

    def hparams(self, values: Mapping[str, Any]) -> None:
        simple = {
            k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in values.items()
        }
        if self._first:
            self._queue.put(lambda writer: writer.write_hparams(simple))
            self.flush()

    def flush(self) -> None:
        self._queue.put(lambda writer: writer.flush())

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join(timeout=CLOSE_TIMEOUT)

    def _run(self, workdir: str) -> None:
        forget_after = None if self._first else self._start_step
        writer = self._attempt(workdir, lambda: _summary_writer(workdir, forget_after))
        while (job := self._queue.get()) is not None:
            if writer is not None:
                writer = self._attempt(workdir, functools.partial(_done, job, writer))
        if writer is not None:
            self._attempt(workdir, writer.close)

    def _attempt(self, workdir: str, action: Callable[[], Any]) -> Any:
        """The action's result, or None after one line: events must not end the training."""
        try:
            return action()
        except Exception as error:
            print(f"TensorBoard events in {workdir} end here ({error})", flush=True)
            return None


def _done(job: Callable[[Any], None], writer: Any) -> Any:
    job(writer)
    return writer


def _summary_writer(workdir: str, forget_after: int | None) -> Any:
    """clu's SummaryWriter, or None without TensorFlow."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # TensorFlow only writes files here; its notice about oneDNN cannot be silenced otherwise.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    try:
        import tensorflow as tf
        from clu.metric_writers.summary_writer import SummaryWriter
    except ImportError as error:
        print(f"TensorBoard events are not written ({error}); metrics.jsonl is.", flush=True)
        return None
    # JAX owns the accelerators.
    for kind in ("GPU", "TPU"):
        tf.config.set_visible_devices([], kind)
    if forget_after is not None:
        _forget(workdir, forget_after)
    return SummaryWriter(workdir)


def _forget(workdir: str, step: int) -> None:
    """Tells TensorBoard to purge the events past `step`; in a file of its own, since the writers of
    TensorFlow 2 write no session log."""
    from tensorboard.compat.proto import event_pb2
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    messages: Any = event_pb2  # made at run time: unknown to type checkers
    start = messages.SessionLog(status=messages.SessionLog.START)
    # Files are read in the order of their names, which hold the second.
    _await_next_second()
    log = EventFileWriter(workdir)
    # Twice, since the first one that TensorBoard meets in a folder is no restart to it.
    for _ in range(2):
        log.add_event(messages.Event(wall_time=time.time(), step=step + 1, session_log=start))
    log.close()
    _await_next_second()


def _await_next_second() -> None:
    time.sleep(1.001 - time.time() % 1.0)


class MultiWriter(Writer):
    """Writes to several writers."""

    def __init__(self, *writers: Writer) -> None:
        self._writers = writers

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for writer in self._writers:
            writer.scalars(step, values)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        for writer in self._writers:
            writer.image(step, name, image)

    def hparams(self, values: Mapping[str, Any]) -> None:
        for writer in self._writers:
            writer.hparams(values)

    def flush(self) -> None:
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


def create(
    workdir: str | Path, *, start_step: int, tensorboard: bool, process_index: int
) -> Writer:
    """The writer of this process: nothing but on process 0."""
    if process_index != 0:
        return Writer()
    writers: list[Writer] = [JsonlWriter(workdir, start_step)]
    if tensorboard:
        writers.append(TensorBoardWriter(workdir, start_step))
    return MultiWriter(*writers)
