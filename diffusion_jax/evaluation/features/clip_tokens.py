"""Captions as tokens of CLIP, by the `tokenizers` library from files that the user names.

A `tokenizer.json` is taken as it is. From `vocab.json` and `merges.txt` the tokeniser of OpenAI is
built (Radford et al. 2021): byte-level pair encoding of lower-case words, where the last piece of a
word ends in `</w>`, between a start and an end.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32

from diffusion_jax.errors import ConfigError

START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 77

_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionTokens:
    """Captions as rows of tokens.

    Attributes:
        tokens: int32 [n, length]: start, caption, end, and further ends up to the length.
        cut: which captions were too long and lost their last tokens before the end.
    """

    tokens: Int32[np.ndarray, "n length"]
    cut: Bool[np.ndarray, " n"]


class CaptionTokenizer:
    """Turns captions into tokens.

    Args:
        tokenizer: of the `tokenizers` library, which puts start and end around a text.
        length: tokens of a row.
    """

    def __init__(self, tokenizer: Any, length: int):
        self._tokenizer, self._length = tokenizer, length
        self._end = tokenizer.token_to_id(END)

    @property
    def vocabulary(self) -> int:
        """One more than the largest token."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def __call__(self, captions: Sequence[str]) -> CaptionTokens:
        """The tokens of some captions."""
        rows = np.full((len(captions), self._length), self._end, np.int32)
        cut = np.zeros(len(captions), bool)
        for number, encoded in enumerate(self._tokenizer.encode_batch(list(captions))):
            cut[number] = len(encoded.ids) > self._length
            # The end stays where the row is full.
            kept = encoded.ids[: self._length - 1]
            rows[number, : len(kept)] = kept
        return CaptionTokens(tokens=rows, cut=cut)


def load(
    path: str | os.PathLike[str], *, length: int = LENGTH, vocabulary: int | None = None
) -> CaptionTokenizer:
    """Reads a tokeniser.

    Args:
        path: a `tokenizer.json`, or a folder with that or with `vocab.json` and `merges.txt`, as
            transformers writes them; of these two files either names both.
        length: tokens of a row, with start and end: the text tower's.
        vocabulary: of the text tower; None leaves it unchecked.

    Raises:
        ConfigError: tokenizers is not installed; there are no such files, or they cannot be read;
            they have no start or end, put them not around a text, or know more tokens than the
            network.
    """
    library = _library()
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    pair = (folder / "vocab.json", folder / "merges.txt")
    whole = folder / "tokenizer.json" if path.is_dir() else path
    if path in pair or (path.is_dir() and not whole.is_file()):
        missing = [file.name for file in pair if not file.is_file()]
        if missing:
            expected = "tokenizer.json, or vocab.json and merges.txt"
            raise ConfigError(f"{folder}: no {' and no '.join(missing)}; expected {expected}")
        tokenizer = _read(folder, lambda: _from_pair(library, *pair))
    elif not whole.is_file():
        raise ConfigError(f"{whole}: no such file; name a tokenizer.json or its folder")
    else:
        tokenizer = _read(whole, lambda: library.Tokenizer.from_file(str(whole)))
    # Rows are cut and filled here, where it is counted.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ends = [tokenizer.token_to_id(START), tokenizer.token_to_id(END)]
    ids = tokenizer.encode("a").ids if None not in ends else []
    if [*ids[:1], *ids[-1:]] != ends:
        raise ConfigError(f"{path}: a text is not put between {START} and {END}, as CLIP has it")
    found = CaptionTokenizer(tokenizer, length)
    if vocabulary is not None and found.vocabulary > vocabulary:
        raise ConfigError(
            f"{path}: {found.vocabulary} tokens, but the text tower has {vocabulary}; name the "
            "tokenizer that was published with its weights"
        )
    return found


def _library() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ConfigError(
            "captions need tokenizers; type: pip install 'diffusion-jax[evaluation]'"
        ) from None
    return tokenizers


def _read(path: Path, reader: Any) -> Any:
    try:
        return reader()
    except Exception as error:  # the library raises Exception itself
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: no tokenizer can be read ({reason})") from None


def _from_pair(library: Any, vocab: Path, merges: Path) -> Any:
    model = library.models.BPE.from_file(
        str(vocab), str(merges), unk_token=END, end_of_word_suffix="</w>"
    )
    tokenizer = library.Tokenizer(model)
    normalizers, pre = library.normalizers, library.pre_tokenizers
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Replace(library.Regex(r"\s+"), " "),
            normalizers.Lowercase(),
        ]
    )
    split = pre.Split(library.Regex(_WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre.Sequence([split, pre.ByteLevel(add_prefix_space=False)])
    ends = [(name, tokenizer.token_to_id(name)) for name in (START, END)]
    if all(number is not None for _, number in ends):
        tokenizer.add_special_tokens([START, END])
        tokenizer.post_processor = library.processors.TemplateProcessing(
            single=f"{START} $A {END}", special_tokens=ends
        )
    return tokenizer
