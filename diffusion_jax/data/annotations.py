"""What comes with pictures: labels, captions, numbers; and many short strings in little memory."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int32, Int64, Shaped

from diffusion_jax.data.text import clipped, tokens
from diffusion_jax.errors import DataError

_LOG = logging.getLogger(__name__)

Conditioning = dict[str, Shaped[np.ndarray, "n ..."]]
"""See `Batch`: `label` int32 [n], `text` int32 [n, length], `scalar` float32 [n, k]."""


class Strings:
    """An immutable list of byte strings: their bytes end to end and where each begins.

    A list of Python's own costs 60 to 100 bytes more for each, which counts with millions.
    """

    def __init__(self, items: Iterable[bytes]) -> None:
        content, ends = bytearray(), array("q", [0])
        for item in items:
            content += item
            ends.append(len(content))
        self._content, self._ends = bytes(content), np.frombuffer(ends, np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._content[self._ends[index] : self._ends[index + 1]]

    def take(self, rows: Int64[np.ndarray, " m"]) -> Strings:
        """The strings at `rows`."""
        return Strings(self[row] for row in rows.tolist())


def captions(texts: Iterable[str], length: int, title: str) -> Strings:
    """Captions as UTF-8 of at most `length` bytes; one warning counts those that were longer.

    Raises:
      DataError: a caption is no text (an unpaired surrogate out of JSON).
    """
    cut = 0

    def encoded() -> Iterable[bytes]:
        nonlocal cut
        for text in texts:
            whole = _utf8(text, title)
            part = clipped(whole, length)
            cut += part != whole
            yield part

    strings = Strings(encoded())
    if cut:
        _LOG.warning(
            "%s: %d of %d captions are longer than text_length=%d bytes and were cut there",
            title,
            cut,
            len(strings),
            length,
        )
    return strings


def _utf8(text: str, title: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        shown = text.encode("ascii", "backslashreplace").decode()
        raise DataError(f"{title}: the caption {shown[:80]!r} has half of a character") from None


@dataclass(frozen=True, kw_only=True)
class Annotations:
    """Labels, captions and numbers of n examples; None for what they do not have.

    Attributes:
      labels: int32 [n].
      texts: n captions in UTF-8.
      text_length: tokens a caption, 0 without captions.
      scalars: float32 [n, k].
    """

    labels: Int32[np.ndarray, " n"] | None = None
    texts: Strings | None = None
    text_length: int = 0
    scalars: Float32[np.ndarray, "n k"] | None = None

    def take(self, rows: Int64[np.ndarray, " m"]) -> Annotations:
        """Those of the examples at `rows`."""
        return Annotations(
            labels=None if self.labels is None else self.labels[rows],
            texts=None if self.texts is None else self.texts.take(rows),
            text_length=self.text_length,
            scalars=None if self.scalars is None else self.scalars[rows],
        )

    def conditioning(self, rows: Int64[np.ndarray, " m"]) -> Conditioning:
        """What a batch carries of the examples at `rows`."""
        entries: Conditioning = {}
        if self.labels is not None:
            entries["label"] = self.labels[rows]
        if self.texts is not None:
            entries["text"] = np.zeros((len(rows), self.text_length), np.int32)
            for row, index in enumerate(rows.tolist()):
                entries["text"][row] = tokens(self.texts[index], self.text_length)
        if self.scalars is not None:
            entries["scalar"] = self.scalars[rows]
        return entries
