"""Captions as tokens against those of transformers; files that do not fit."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import recorded
import tokenizers

from diffusion_jax.errors import ConfigError
from diffusion_jax.evaluation.features import clip_tokens

LENGTH = 24


@pytest.fixture(scope="module")
def recording():
    with np.load(recorded.FOLDER / "clip_tokens.npz") as file:
        return json.loads(str(file["about"])), file["tokens"]


@pytest.fixture
def folder(tmp_path, recording):
    """With vocab.json and merges.txt as transformers writes them."""
    about, _ = recording
    (tmp_path / "vocab.json").write_text(json.dumps(about["vocabulary"]))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in about["merges"])]
    (tmp_path / "merges.txt").write_text("\n".join(lines))
    return tmp_path


@pytest.mark.parametrize("name", ["", "vocab.json", "merges.txt"])
def test_tokens_are_those_of_transformers(folder, recording, name):
    about, tokens = recording
    found = clip_tokens.load(folder / name, length=LENGTH)
    rows = found(about["captions"])
    np.testing.assert_array_equal(rows.tokens, tokens)
    assert rows.tokens.dtype == np.int32
    cut = [row[-1] == row.max() and row[-2] != row.max() for row in tokens]
    assert rows.cut.tolist() == cut
    assert any(cut)
    assert found.vocabulary == len(about["vocabulary"])


@pytest.mark.parametrize("in_folder", [True, False])
def test_a_tokenizer_file_gives_the_same(folder, tmp_path, recording, in_folder):
    about, tokens = recording
    inner = clip_tokens.load(folder)._tokenizer
    inner.enable_truncation(7)
    inner.enable_padding(length=9)
    other = tmp_path / "whole"
    other.mkdir()
    inner.save(str(other / "tokenizer.json"))
    found = clip_tokens.load(other if in_folder else other / "tokenizer.json", length=LENGTH)
    np.testing.assert_array_equal(found(about["captions"]).tokens, tokens)


def test_no_captions_and_rows_of_77(folder):
    assert clip_tokens.load(folder)([]).tokens.shape == (0, 77)


def test_the_vocabulary_fits_the_network(folder, recording):
    number = len(recording[0]["vocabulary"])
    assert clip_tokens.load(folder, vocabulary=number).vocabulary == number
    with pytest.raises(ConfigError, match=f"{number} tokens, but the text tower has 500"):
        clip_tokens.load(folder, vocabulary=500)


def test_files_that_do_not_fit(folder, tmp_path, recording):
    def refusal(path) -> str:
        with pytest.raises(ConfigError) as error:
            clip_tokens.load(path)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "nowhere.json: no such file" in refusal(tmp_path / "nowhere.json")
    (tmp_path / "broken.json").write_text("{")
    assert "no tokenizer can be read" in refusal(tmp_path / "broken.json")
    plain = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    plain.save(str(tmp_path / "plain.json"))
    assert "is not put between" in refusal(tmp_path / "plain.json")
    (folder / "vocab.json").write_text('{"a": 0}')
    assert "no tokenizer can be read" in refusal(folder)
    (folder / "merges.txt").write_text("#version: 0.2\n")
    assert "is not put between" in refusal(folder)
    (folder / "merges.txt").unlink()
    assert "no merges.txt; expected tokenizer.json, or" in refusal(folder)
    (folder / "vocab.json").unlink()
    assert "no vocab.json and no merges.txt" in refusal(folder)


def test_a_missing_extra_names_the_command(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r"pip install 'diffusion-jax\[evaluation\]'"):
        clip_tokens.load(folder)
