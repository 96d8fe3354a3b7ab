"""How far the reading of a data set has come: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm

_LOG = logging.getLogger(__name__)
# Seconds between lines of a log; what takes less needs none.
_INTERVAL = 15.0


@contextlib.contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields what to call with the number of items that are done since the last call."""
    if sys.stderr.isatty():
        with tqdm(desc=title, total=total, unit_scale=True, leave=False) as bar:

            def draw(count: int) -> None:
                bar.update(count)

            yield draw
        return
    done, told = 0, time.monotonic()

    def advance(count: int) -> None:
        nonlocal done, told
        done += count
        if time.monotonic() - told > _INTERVAL:
            told = time.monotonic()
            _LOG.info("%s: %d of %d", title, done, total)

    yield advance
