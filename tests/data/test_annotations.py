"""Labels, captions and numbers in little memory."""

from __future__ import annotations

import numpy as np
import pytest

from diffusion_jax.data.annotations import Annotations, Strings, captions, clipped, tokens
from diffusion_jax.errors import DataError


def test_strings_are_a_list_of_bytes():
    items = [b"", b"one", b"\xff\x00", b"three" * 9]
    strings = Strings(items)
    assert len(strings) == 4
    assert [strings[n] for n in range(4)] == items
    assert [strings.take(np.array([3, 1, 1]))[n] for n in range(3)] == [items[3], b"one", b"one"]
    for outside in (-1, 4):
        with pytest.raises(IndexError):
            strings[outside]
    assert len(Strings([])) == 0


@pytest.mark.parametrize("text", ["plain", "naïve", "日本語の字幕", "a👩‍🚀b", "é" * 9])
def test_cutting_never_leaves_half_a_character(text):
    whole = text.encode()
    for length in range(len(whole) + 3):
        part = clipped(whole, length)
        assert len(part) <= length
        assert text.startswith(part.decode())
        # Nothing shorter than need be: the next character does not fit.
        if len(part) < len(whole):
            following = text[len(part.decode())].encode()
            assert len(part) + len(following) > length


def test_tokens_are_bytes_and_one_and_zeros_behind():
    row = tokens("aÿ".encode() + b"\0", 6)
    assert row.dtype == np.int32
    assert row.tolist() == [98, 0xC3 + 1, 0xBF + 1, 1, 0, 0]
    assert tokens(b"\xff" * 2, 2).tolist() == [256, 256]


def test_captions_that_are_cut_are_counted_in_one_warning(caplog):
    with caplog.at_level("WARNING"):
        strings = captions(["short", "long enough", "longer than that"], 6, "the set")
    assert [strings[n] for n in range(3)] == [b"short", b"long e", b"longer"]
    assert caplog.messages == [
        "the set: 2 of 3 captions are longer than text_length=6 bytes and were cut there"
    ]


def test_half_a_character_out_of_json_is_refused():
    with pytest.raises(DataError, match=r"the set: the caption 'a\\\\ud800' has half"):
        captions(["fine", "a\ud800"], 9, "the set")


def test_taken_annotations_belong_to_their_examples():
    annotations = Annotations(
        labels=np.arange(5, dtype=np.int32),
        texts=Strings(str(n).encode() for n in range(5)),
        text_length=3,
        scalars=np.arange(10, dtype=np.float32).reshape(5, 2),
    ).take(np.array([4, 2, 0]))
    entries = annotations.conditioning(np.array([2, 1]))
    assert entries["label"].tolist() == [0, 2]
    assert entries["text"].tolist() == [[ord("0") + 1, 0, 0], [ord("2") + 1, 0, 0]]
    assert entries["scalar"].tolist() == [[0, 1], [4, 5]]
    assert Annotations().conditioning(np.array([2, 1])) == {}
