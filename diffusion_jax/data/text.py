"""Captions as tokens: UTF-8 bytes + 1, with zeros behind them; tokens of a text as characters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int32


def clipped(text: bytes, length: int) -> bytes:
    """UTF-8 cut to at most `length` bytes, not within a character."""
    if len(text) <= length:
        return text
    # Bytes 10xxxxxx continue a character.
    while length and text[length] & 0xC0 == 0x80:
        length -= 1
    return text[:length]


def tokens(text: bytes, length: int) -> Int32[np.ndarray, " length"]:
    """The tokens of one text in UTF-8, cut to fit."""
    row = np.zeros(length, np.int32)
    part = np.frombuffer(clipped(text, length), np.uint8)
    row[: len(part)] = part
    row[: len(part)] += 1
    return row


def encode(texts: Sequence[str], length: int) -> Int32[np.ndarray, "n length"]:
    """The tokens of several texts."""
    return np.stack([tokens(text.encode("utf-8"), length) for text in texts])


def decode(rows: Iterable[Int32[np.ndarray, " length"]]) -> list[str]:
    """The texts that rows of tokens stand for."""
    return [bytes((row[row > 0] - 1).astype(np.uint8)).decode("utf-8", "replace") for row in rows]


BYTES = 256
HIDDEN = "\N{LIGHT SHADE}"
"""Stands for a token that is masked; no byte is read as it in Latin-1."""


def decode_tokens(rows: Iterable[Int32[np.ndarray, " length"]], characters: str) -> list[str]:
    """The texts that rows of tokens spell, token i being characters[i]; further tokens are masks.

    256 characters are raw bytes, which are read as UTF-8.
    """
    known = np.array([*characters, HIDDEN])
    texts = ["".join(known[np.minimum(row, len(characters))]) for row in rows]
    if len(characters) != BYTES:
        return texts
    return ["".join(map(_from_bytes, re.split(f"({HIDDEN})", text))) for text in texts]


def _from_bytes(part: str) -> str:
    return part if part == HIDDEN else part.encode("latin-1").decode("utf-8", "replace")
