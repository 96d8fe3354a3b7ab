"""How a run shows itself: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm


class Progress:
    """A progress bar on a terminal; in a file, one line per interval.

    Only process 0 shows anything. `stream` is a text file, standard error by default.
    """

    def __init__(self, total: int, start: int, *, enabled: bool = True, stream: Any = None) -> None:
        self._stream = stream or sys.stderr
        self._total, self._start, self._began = total, start, time.monotonic()
        self._enabled = enabled
        self._bar: Any = None
        if enabled and self._stream.isatty():
            self._bar = tqdm(
                total=total, initial=start, unit="step", file=self._stream, dynamic_ncols=True
            )

    def step(self, step: int) -> None:
        """Moves to `step` updates done."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Shows loss, images/s and the time left."""
        loss, rate = scalars.get("train/loss"), scalars.get("train/images_per_second")
        shown = {}
        if loss is not None:
            shown["loss"] = f"{loss:.4f}"
        if rate is not None:
            shown["images/s"] = f"{rate:.0f}"
        if self._bar is not None:
            self._bar.set_postfix(shown)
        elif self._enabled:
            elapsed = time.monotonic() - self._began
            left = elapsed / max(step - self._start, 1) * (self._total - step)
            parts = " ".join(f"{k} {v}" for k, v in shown.items())
            self.note(f"step {step}/{self._total} {parts} eta {_duration(left)}")

    def note(self, message: str) -> None:
        """One line that does not break the bar."""
        if not self._enabled:
            return
        if self._bar is not None:
            tqdm.write(message, file=self._stream)
        else:
            print(message, file=self._stream, flush=True)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
