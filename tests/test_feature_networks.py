"""Scores over networks of published files, from the door; files that are none of them."""

from __future__ import annotations

import functools
import inspect
import json
import shutil

import feature_recipe
import numpy as np
import pytest
import recorded
from quick import jit
from safetensors.numpy import save_file
from toys import one_device

import diffusion_jax
from diffusion_jax import api, builders, judged, start, workdir
from diffusion_jax.errors import ConfigError
from diffusion_jax.evaluation.features import clip, efficientnet_lite0, inception
from diffusion_jax.evaluation.features.clip_tokens import END, START
from diffusion_jax.evaluation.features.extract import Extractor
from diffusion_jax.feature_networks import feature_network

PROMPTS = ["grey 1", "grey 2", "grey 1 2"]
LETTERS = ("g", "r", "e", "y</w>", "1</w>", "2</w>")
DRAWN = {"seed": 5, "steps": 2}


# Its programs are optimised: without, convolutions of 224 x 224 pixels take minutes.
@pytest.fixture(scope="module", autouse=True)
def _one_device():
    with one_device():
        yield


@pytest.fixture(autouse=True)
def _small(monkeypatch, tmp_path):
    """A cache of its own, and batches that are not filled up to 64 pictures."""
    monkeypatch.setattr(start, "default_cache", lambda: tmp_path / "xla")
    monkeypatch.setattr(judged, "Extractor", functools.partial(Extractor, batch_size=4))


@pytest.fixture(scope="module")
def run(captioned_run, tmp_path_factory):
    copy = tmp_path_factory.mktemp("judged") / "run"
    shutil.copytree(captioned_run[0], copy)
    return copy


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random weights, with the counters that PyTorch puts beside them."""
    tensors = feature_recipe.weights(efficientnet_lite0.shapes())
    path = tmp_path_factory.mktemp("weights") / "lite0.safetensors"
    save_file({**tensors, "_bn0.num_batches_tracked": np.array(3)}, path)
    return path


@pytest.fixture(scope="module")
def both_towers(tmp_path_factory):
    """A tiny CLIP, with its vocabulary beside it."""
    folder = tmp_path_factory.mktemp("clip")
    save_file(recorded.load("clip")[0], folder / "model.safetensors")
    vocabulary = {piece: number for number, piece in enumerate(LETTERS)}
    (folder / "vocab.json").write_text(json.dumps({**vocabulary, START: 97, END: 98}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


def refusal(run, features, metrics="fd", **arguments):
    """What is said of features that do not fit; nothing is added to the scores."""
    with pytest.raises(ConfigError) as raised:
        inspect.unwrap(api.evaluate)(run, [metrics], num=20, features=features, **arguments)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_file_of_weights_by_name(run, weights):
    features = f"efficientnet_lite0:{weights}"
    arguments = {"num": 20, "features": features, "reference": "validation", **DRAWN}
    rows = api.evaluate(run, ["fd", "kid", "cmmd"], **arguments)
    assert [row["score"] for row in rows] == [
        *("FD-EffNetLite0", "KID-EffNetLite0", "CMMD-EffNetLite0")
    ]
    built = efficientnet_lite0.build(feature_recipe.weights(efficientnet_lite0.shapes()), "")
    for row in rows:
        assert row["weights_hash"] == built.weights_hash
        assert row["features"] == "efficientnet_lite0"
        assert row["resize"] == efficientnet_lite0.RESIZE
        assert np.isfinite(row["value"])
    assert "not of CLIP" in rows[2]["remark"]
    assert "not of CLIP" not in rows[1]["remark"]


def test_files_that_are_no_weights(run, tmp_path):
    assert refusal(run, "efficientnet_lite0") == (
        "features='efficientnet_lite0': expected efficientnet_lite0:FILE, the file of its weights"
    )
    missing = tmp_path / "none.safetensors"
    found = refusal(run, f"efficientnet_lite0:{missing}")
    assert found.endswith(f"there is no file {str(missing)!r}; expected its weights")
    (tmp_path / "text").write_text("weights")
    words = "damaged or no file of weights: neither safetensors nor written by torch.save"
    assert refusal(run, f"dinov2:{tmp_path}/text") == f"features={tmp_path}/text: {words}"


def test_a_file_that_was_cut_off(run, weights, tmp_path):
    (tmp_path / "cut").write_bytes(weights.read_bytes()[:-5000])
    found = refusal(run, f"efficientnet_lite0:{tmp_path}/cut")
    assert found.startswith(f"features={tmp_path}/cut: damaged or no file of weights: ")


def test_tensors_that_do_not_fit(run, tmp_path):
    tensors = feature_recipe.weights(efficientnet_lite0.shapes())
    narrow = {name: x for name, x in tensors.items() if name not in ("_fc.bias", "_bn0.bias")}
    narrow["_conv_stem.weight"] = narrow["_conv_stem.weight"][:16]
    path = tmp_path / "narrow.safetensors"
    save_file(narrow, path)
    found = refusal(run, f"efficientnet_lite0:{path}")
    assert found.startswith(
        f"features={path}: not the weights of efficientnet_lite0: missing: _bn0.bias, _fc.bias; "
        "of another shape: _conv_stem.weight [16, 3, 3, 3] instead of [32, 3, 3, 3] ("
    )
    assert f"({len(narrow)} tensors, hash " in found


def test_weights_of_another_network(run, weights, both_towers):
    path = both_towers / "model.safetensors"
    found = refusal(run, f"inception:{path}")
    assert found.startswith(f"features={path}: not the weights of inception_v3: missing: Conv2d_1a")
    assert "; unexpected: logit_scale, " in found
    found = refusal(run, f"dinov2:{weights}")
    assert f"{weights}: not the weights of DINOv2: there is no embeddings.patch_emb" in found
    found = refusal(run, f"clip:{weights}")
    assert f"{weights}: not the weights of CLIP's picture tower: there is no vision_model" in found


def test_how_inception_resizes_is_named_after_its_file(run, tmp_path):
    """Its tensors are of the right shapes: nothing is computed with them."""
    path = tmp_path / "inception.safetensors"
    save_file({n: np.ones(s, np.float32) for n, s in inception.shapes().items()}, path)
    training = builders.source(workdir.read_config(run), "train")

    def resize(asked):
        return feature_network(f"inception:{path}{asked}", None, training, tmp_path, len)[0].resize

    resizes = {asked: resize(asked) for asked in ("", ":pytorch_fid", ":tf1")}
    default = inception.RESIZES["pytorch_fid"]
    assert resizes == {"": default, ":pytorch_fid": default, ":tf1": inception.RESIZES["tf1"]}
    for wrong in ("tf2", ""):
        found = refusal(run, f"inception:{path}:{wrong}")
        words = f"features=inception:FILE:RESIZE: resize={wrong!r} is unknown"
        assert found.startswith(words)
        assert found.endswith("pytorch_fid, tf1")


def test_accuracy_is_no_matter_of_other_classes(run, weights):
    assert refusal(run, f"efficientnet_lite0:{weights}", "class_accuracy") == (
        "class_accuracy: features=efficientnet_lite0 has other classes than the data; expected "
        "features=self"
    )


@pytest.fixture(scope="module")
def expected(run, both_towers):
    """100 max(cos, 0) of each sample, by hand: its own prompt, and its own picture."""
    samples = diffusion_jax.load(run).sample(20, prompts=PROMPTS, **DRAWN)
    tensors = recorded.load("clip")[0]
    pictures, texts = clip.build(tensors, ""), clip.build_text(tensors, "")
    number = {piece: i for i, piece in enumerate(LETTERS)}
    rows = []
    for prompt in PROMPTS:
        pieces = [number[p] for p in ["g", "r", "e", "y</w>"]]
        pieces += [number[f"{digit}</w>"] for digit in prompt.split()[1:]]
        rows.append([97, *pieces, *[98] * (11 - len(pieces))])
    captions = jit(texts.apply)(texts.params, np.array(rows))["features"]
    shown = jit(pictures.apply)(pictures.params, samples.x)["features"]
    captions, shown = np.asarray(captions)[np.arange(20) % 3], np.asarray(shown)
    lengths = np.linalg.norm(captions, axis=1) * np.linalg.norm(shown, axis=1)
    return 100 * np.maximum((captions * shown).sum(1) / lengths, 0)


@pytest.mark.parametrize("named", [False, True])
def test_pictures_and_their_prompts(run, both_towers, expected, tmp_path, named):
    assert np.ptp(expected) > 0.1
    path, tokenizer = both_towers / "model.safetensors", ""
    if named:
        shutil.copy(path, tmp_path)
        path, tokenizer = tmp_path / path.name, f":{both_towers}"
    arguments = {"num": 20, "features": f"clip:{path}{tokenizer}", "prompts": PROMPTS, **DRAWN}
    (row,) = api.evaluate(run, "clip_score", batch_size=8, **arguments)
    np.testing.assert_allclose(row["value"], expected.mean(), rtol=1e-4)
    np.testing.assert_allclose(row["standard_error"], expected.std(ddof=1) / 20**0.5, rtol=1e-3)
    assert (row["score"], row["n"]) == ("CLIP-score", 20)
    # No config.json says which options the towers have.
    assert row["features"] == (
        "clip_vit_128_8_32 (quick_gelu, 2 heads, epsilon 1e-05; quick_gelu assumed: no config.json "
        "beside the file says which)"
    )
    assert "text tower of quick_gelu, 1 heads, epsilon 1e-05, end token 2, quick_g" in row["remark"]


def test_captions_that_cannot_be_scored(run, weights, both_towers, tmp_path):
    file = f"clip:{both_towers}/model.safetensors"
    words = "metrics=clip_score: prompts='', but every sample needs a caption; give --prompt"
    assert refusal(run, file, "clip_score", prompts=["grey 1", ""]).startswith(words)
    given = {"metrics": "clip_score", "prompts": PROMPTS}
    for other in ("self", f"efficientnet_lite0:{weights}", "clip"):
        words = f"metrics=clip_score: features={other!r} has no text tower; expected clip:FILE"
        assert refusal(run, other, **given) == words
    tensors = recorded.load("clip")[0]
    alone = {name: x for name, x in tensors.items() if not name.startswith("text")}
    save_file(alone, tmp_path / "pictures.safetensors")
    found = refusal(run, f"clip:{tmp_path}/pictures.safetensors", **given)
    assert "pictures.safetensors: not the weights of CLIP's text tower: there is no text_" in found
    save_file(tensors, tmp_path / "both.safetensors")
    assert refusal(run, f"clip:{tmp_path}/both.safetensors", **given) == (
        f"metrics=clip_score, features=clip:FILE:TOKENIZER: {tmp_path}: no vocab.json and no "
        "merges.txt; expected tokenizer.json, or vocab.json and merges.txt"
    )
    (tmp_path / "vocab.json").write_text(json.dumps({START: 97, END: 99}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    found = refusal(run, f"{file}:{tmp_path}/vocab.json", **given)
    assert "100 tokens, but the text tower has 99; name the tokenizer that was published" in found
