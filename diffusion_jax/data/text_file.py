"""Windows of a text file as tokens, in the manner of text8.

text8 (M. Mahoney, 2006) is 100 MB of Wikipedia in 27 symbols, of which by custom the first 90% are
for training, the next 5% for validation and the last 5% for testing. Any other file is brought to
the same symbols, or read as raw bytes.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8

from diffusion_jax.data.spec import Batch, DataSpec, Split
from diffusion_jax.errors import ConfigError, DataError, check_local, unknown_name

LETTERS = " abcdefghijklmnopqrstuvwxyz"
"""The 27 symbols of text8 in the order of their tokens."""
BYTES = "".join(map(chr, range(256)))
"""Raw bytes as Latin-1; `data.text.decode_tokens` reads what they spell as UTF-8."""
ALPHABETS = {"text8": LETTERS, "bytes": BYTES}
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_FIELD = "data.path"


def text(
    split: Split, *, path: str | os.PathLike[str], alphabet: str = "text8", length: int = 256
) -> TextWindows:
    """Windows of `length` tokens; the id is the window's first place in the normalised file.

    Training takes windows from every place of the first 90% of the tokens, validation the
    windows side by side of the next 5%; nothing of the last 5% is in either.

    Args:
      split: "train" or "validation".
      path: the file.
      alphabet: "text8": `normalise`; "bytes": the file as it is, 256 tokens.
      length: tokens of a window.

    Raises:
      ConfigError: no path is set, or an option is out of range.
      DataError: the file cannot be read, or is too short for a window in either split.
    """
    if alphabet not in ALPHABETS:
        raise ConfigError(unknown_name("data.text.alphabet", alphabet, ALPHABETS))
    if length < 1:
        raise ConfigError(f"data.text.length={length}: expected at least 1")
    raw = _read(path)
    tokens = _tokens(normalise(raw)) if alphabet == "text8" else np.frombuffer(raw, np.uint8)
    ends = [0, len(tokens) * 9 // 10, len(tokens) * 19 // 20]
    if min(np.diff(ends)) < length:
        raise DataError(
            f"{_FIELD}={path} has {len(tokens)} tokens; expected at least {20 * length} for "
            f"windows of data.text.length={length}, since 5% are held out"
        )
    first, last = (ends[0], ends[1]) if split == "train" else (ends[1], ends[2])
    characters = ALPHABETS[alphabet]
    spec = DataSpec(
        shape=(length,),
        kind="tokens",
        vocabulary=len(characters),
        characters=characters,
        range=(0.0, len(characters) - 1.0),
    )
    stride = 1 if split == "train" else length
    return TextWindows(spec=spec, tokens=tokens[first:last], first=first, stride=stride)


def normalise(raw: bytes) -> bytes:
    """Text in the 27 symbols of text8; what is in them already stays as it is.

    Letters a to z in lower case, digits spelled out as words, and one space for every run of
    anything else. Letters beyond ASCII are anything else too.
    """
    lower = raw.lower()
    for digit, word in enumerate(_DIGITS):
        lower = lower.replace(str(digit).encode(), f" {word} ".encode())
    return re.sub(rb"[^a-z]+", b" ", lower)


def _tokens(letters: bytes) -> UInt8[np.ndarray, " n"]:
    values = np.frombuffer(letters, np.uint8)
    return np.where(values == ord(" "), 0, values - (ord("a") - 1)).astype(np.uint8)


def _read(path: str | os.PathLike[str]) -> bytes:
    if not os.fspath(path):
        raise ConfigError(f"{_FIELD} is not set: name a text file, --config.data.path=FILE")
    check_local(_FIELD, path)
    try:
        with open(os.path.expanduser(path), "rb") as file:
            raw = file.read()
    except OSError as error:
        raise DataError(
            f"{_FIELD}={path} cannot be read: {error.strerror}; expected a text file"
        ) from None
    if not raw:
        raise DataError(f"{_FIELD}={path} is empty; expected a text file")
    return raw


@dataclass(frozen=True, kw_only=True)
class TextWindows:
    """A source of windows of one long sequence.

    Attributes:
      spec: of a window.
      tokens: uint8 [n] of the split.
      first: place of the split in the file, in tokens.
      stride: from one window's first token to the next's.
    """

    spec: DataSpec
    tokens: UInt8[np.ndarray, " n"]
    first: int
    stride: int

    def __len__(self) -> int:
        return (len(self.tokens) - self.spec.shape[0]) // self.stride + 1

    def ids(self, indices: Int64[np.ndarray, " m"]) -> Int64[np.ndarray, " m"]:
        """Places in the file of the windows at `indices`."""
        return self.first + self.stride * indices

    def fetch(
        self, indices: Int64[np.ndarray, " m"], positions: Int64[np.ndarray, " m"] | None = None
    ) -> Batch:
        """The windows at `indices`, `x` int32 [m, length]; positions change nothing here."""
        places = self.stride * indices[:, None] + np.arange(self.spec.shape[0])
        conditioning: dict[str, Any] = {}
        return {
            "x": self.tokens[places].astype(np.int32),
            "conditioning": conditioning,
            "id": self.ids(indices),
        }
