"""Tokens of texts, binary pictures and Markov chains."""

from __future__ import annotations

import numpy as np
import pytest

from diffusion_jax import data
from diffusion_jax.data.markov import entropy_bits, stationary, transitions
from diffusion_jax.data.text import HIDDEN, decode_tokens
from diffusion_jax.data.text_file import BYTES, LETTERS, normalise
from diffusion_jax.errors import ConfigError, DataError


def everything(source):
    return source.fetch(np.arange(len(source)))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "book.txt"
    words = np.random.default_rng(0).choice(["Alice", "fell", "42", "times;", "caf\u00e9"], 400)
    path.write_text(" ".join(words))
    return path


@pytest.mark.parametrize("name", ["text", "bytes", "markov", "digits"])
def test_every_source_of_tokens_keeps_the_contract(name, file):
    options = {
        "text": {"path": file, "length": 16},
        "bytes": {"path": file, "length": 16, "alphabet": "bytes"},
        "markov": {"states": 5, "length": 16, "size": 50, "held_out": 20},
        "digits": {"binarise": True},
    }[name]
    source = "text" if name == "bytes" else name
    train, held_out = (data.load(source, split, **options) for split in ("train", "validation"))
    assert not set(everything(train)["id"]) & set(everything(held_out)["id"])
    for part in (train, held_out):
        assert isinstance(part, data.Source)
        batch, spec = everything(part), part.spec
        assert spec.kind == "tokens"
        assert spec.range == (0.0, spec.vocabulary - 1.0)
        assert batch["x"].dtype == np.int32
        assert batch["x"].shape == (len(part), *spec.shape)
        assert batch["x"].min() >= 0
        assert batch["x"].max() < spec.vocabulary
        assert len(spec.characters) in (0, spec.vocabulary)
        assert len(set(batch["id"])) == len(part)
        again = part.fetch(np.array([3, 0, 3]), np.array([100, 101, 102]))
        np.testing.assert_array_equal(again["x"], batch["x"][[3, 0, 3]])
        np.testing.assert_array_equal(again["id"], part.ids(np.array([3, 0, 3])))


def test_text_is_brought_to_27_symbols():
    assert normalise(b"In 1990, C-3PO\n") == b"in one nine nine zero c three po "
    assert normalise("\u00fcber Nacht".encode()) == b" ber nacht"
    once = normalise(b" Anarchism originated as a term of abuse, first used 4x against ")
    assert normalise(once) == once


def test_windows_are_of_their_part_of_the_file(file):
    """90% and the next 5%, as the custom is; what lies behind is in neither."""
    whole = normalise(file.read_bytes()).decode()
    count = len(whole)
    train, held_out = (data.load("text", s, path=file, length=16) for s in ("train", "validation"))
    assert len(train) == count * 9 // 10 - 15
    assert len(held_out) == (count * 19 // 20 - count * 9 // 10) // 16
    for source in (train, held_out):
        batch = everything(source)
        texts = decode_tokens(batch["x"], LETTERS)
        for text, place in zip(texts, batch["id"], strict=True):
            assert text == whole[place : place + 16]
    assert everything(train)["id"][-1] + 16 == count * 9 // 10
    assert everything(held_out)["id"][0] == count * 9 // 10


def test_bytes_are_read_as_utf8_and_masks_are_shown(file):
    raw = file.read_bytes()
    source = data.load("text", "train", path=file, length=40, alphabet="bytes")
    batch = source.fetch(np.array([0]))
    np.testing.assert_array_equal(batch["x"][0], np.frombuffer(raw[:40], np.uint8))
    cafe = np.frombuffer("caf\u00e9 \u00b7".encode(), np.uint8).astype(np.int32)
    assert decode_tokens([cafe], BYTES) == ["caf\u00e9 \u00b7"]
    assert decode_tokens([np.append(cafe[:3], np.int32(256))], BYTES) == [f"caf{HIDDEN}"]
    assert decode_tokens([np.array([1, 27, 0], np.int32)], LETTERS) == [f"a{HIDDEN} "]


def test_markov_chain_has_the_entropy_it_claims():
    """By counting pairs in 200,000 letters, and by enumeration of all short sequences."""
    states, length = 4, 50
    source = data.load("markov", "train", states=states, length=length, size=4000, seed=3)
    x, matrix = everything(source)["x"], transitions(states, 3)
    pairs = np.zeros((states, states))
    np.add.at(pairs, (x[:, :-1].ravel(), x[:, 1:].ravel()), 1.0)
    np.testing.assert_allclose(pairs / pairs.sum(1, keepdims=True), matrix, atol=0.02)
    shares = np.bincount(x[:, 0], minlength=states) / len(x)
    np.testing.assert_allclose(shares, stationary(matrix), atol=0.04)
    np.testing.assert_allclose(stationary(matrix) @ matrix, stationary(matrix), atol=1e-12)

    p = stationary(matrix)
    chance = np.einsum("i,ij,jk,kl->ijkl", p, matrix, matrix, matrix)
    np.testing.assert_allclose(-(chance * np.log2(chance)).sum(), entropy_bits(matrix, 4))


def test_a_longer_set_begins_with_the_shorter_one():
    few, many = (data.load("markov", "train", size=n, length=8) for n in (10, 20))
    np.testing.assert_array_equal(few.x, many.x[:10])


def test_binary_digits_are_those_with_half_the_ink():
    grey, black = (data.load("digits", "validation", binarise=b) for b in (False, True))
    np.testing.assert_array_equal(black.x, grey.x[..., 0] >= 0.0)
    np.testing.assert_array_equal(black.labels, grey.labels)


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        (None, {}, "cannot be read: No such file or directory"),
        (b"", {}, "is empty; expected a text file"),
        (b"\xff\xfe" * 50, {"length": 4}, "has 1 tokens; expected at least 80"),
        (b"a" * 100, {"length": 6}, "has 100 tokens; expected at least 120 for windows of"),
    ],
)
def test_bad_files(tmp_path, content, options, words):
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=words) as raised:
        data.load("text", "train", path=path, **options)
    assert str(raised.value).startswith(f"data.path={path}")
    assert "\n" not in str(raised.value)
    assert raised.value.exit_code == 65


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("text", {"path": ""}, "data.path is not set: name a text file"),
        ("text", {"path": "x", "alphabet": "text"}, "did you mean 'text8'"),
        ("text", {"path": "x", "length": 0}, r"data\.text\.length=0: expected at least 1"),
        ("markov", {"states": 28}, r"data\.markov\.states=28: expected 2 to 27"),
        ("markov", {"held_out": 0}, r"data\.markov\.held_out=0"),
    ],
)
def test_bad_options(name, options, words):
    with pytest.raises(ConfigError, match=words):
        data.load(name, "validation", **options)
