"""Scores of a trained workdir, from the door to the files that hold them."""

from __future__ import annotations

import inspect
import json

import numpy as np
import pytest
from PIL import Image
from toys import one_device

import diffusion_jax
from diffusion_jax import api, builders, evaluations, start
from diffusion_jax import config as configs
from diffusion_jax.data.part import Part
from diffusion_jax.errors import ConfigError
from diffusion_jax.evaluation import collected, metrics, references, report
from diffusion_jax.evaluation.features import self_trained
from diffusion_jax.evaluation.features.extract import Extractor, three_channels
from diffusion_jax.feature_networks import feature_network
from diffusion_jax.parallel.mesh import make_mesh
from diffusion_jax.pipelines.pixel import PixelPipeline


def points():
    config = configs.base()
    config.data.name = "points"
    config.data.points.update(distribution="swiss_roll", size=64, held_out=32)
    config.network.name = "mlp"
    config.network.mlp.update(width=16, depth=1)
    config.optimizer.warmup_steps = 0
    config.steps, config.batch_size = 4, 32
    config.logging.update(every=2, tensorboard=False)
    config.validation.examples = 32
    config.sampling.update(solver="ddim", steps=3, num=4, batch_size=4)
    return config


def digits():
    config = points()
    config.data.name = "digits"
    config.network.name = "dit"
    config.network.dit.update(patch=4, dim=16, depth=1, heads=2)
    return config


@pytest.fixture(scope="module", autouse=True)
def _quick(quick_programs):
    with one_device():
        yield


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module", autouse=True)
def _short(cache):
    """A short training of the feature network, kept apart from the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(self_trained, "STEPS", 150)
        patch.setattr(start, "default_cache", lambda: cache / "xla")
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    diffusion_jax.train(digits(), folder)
    return folder


def test_scores_say_all_that_decides_them(run):
    names = ["fd", "kid", "precision_recall", "inception_score", "class_accuracy", "nearest", "bpd"]
    rows = api.evaluate(run, names, num=60, batch_size=32, seed=3)
    found = {row["score"]: row for row in rows}
    assert list(found) == [
        *("FD-self", "KID-self", "precision-self", "recall-self", "IS-self"),
        *("class-accuracy-self", "memorisation-self", "bits/dim", "bits/example"),
        *("prior-bits/dim", "diffusion-bits/dim", "reconstruction-bits/dim"),
    ]
    row = found["FD-self"]
    assert row["n"] == 60
    assert row["step"] == 4
    assert row["solver"] == "ddim"
    assert row["steps"] == 3
    assert row["seed"] == 3
    assert row["ema"] == "default"
    assert row["reference"] == "digits train"
    assert row["reference_count"] == 1400
    assert row["rounding"].endswith("to uint8")
    assert len(row["weights_hash"]) == len(row["reference_hash"]) == 16
    assert "few samples (below 10000), fewer than the 64 dimensions" in row["remark"]
    assert row["standard_error"] > 0.0
    assert 0.0 < row["sampling_and_features_share"] < 1.0
    # An untrained network draws noise: nothing like the digits, and no copies of them.
    assert found["precision-self"]["value"] < 0.5
    assert found["memorisation-self"]["value"] < 0.2
    assert (run / "evaluation" / "nearest_00000004.png").stat().st_size > 500
    lines = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    assert [line["score"] for line in lines[-12:]] == list(found)
    table = (run / "eval.md").read_text()
    assert table.count("\n") == 2 + len(lines)
    assert "| FD-self |" in table
    # The same again, in other batches: the same numbers.
    again = api.evaluate(run, ["fd", "kid"], num=60, batch_size=20, seed=3)
    for new in again:
        np.testing.assert_allclose(new["value"], found[new["score"]]["value"], rtol=1e-4)
    steps, values, errors = evaluations.curve(run, "FD-self")
    assert steps.tolist() == [4.0, 4.0]
    assert np.isfinite([*values, *errors]).all()


@pytest.fixture(scope="module")
def network(run, cache):
    config = digits()
    training = builders.source(config, "train")
    found, remark = feature_network("self", config, training, cache / "own", lambda text: None)
    assert remark.startswith("right for ")
    assert remark.endswith("of 397 held out")
    return found


def judged(network, pixels, folder, split="train"):
    extractor = Extractor(network, make_mesh(), batch_size=100)
    source = builders.source(digits(), split)
    reference = references.of_source(source, split, extractor, ("features",), folder)
    part = collected.Collected(len(pixels))
    part.add(pixels, extractor)
    return metrics.scores(["fd"], part, reference, network)[0].estimate, reference


def test_real_pictures_are_nearer_than_noise_of_the_same_pixels(network, cache):
    parts = list(references.pictures(builders.source(digits(), "validation")))
    held = np.concatenate([pixels for pixels, _ in parts])
    real, reference = judged(network, held, cache)
    noise, again = judged(network, np.random.default_rng(0).permuted(held, axis=0), cache)
    assert real.value + 5 * real.standard_error < noise.value
    # The second time the reference is read: the same numbers, and the hash of what it holds.
    assert (
        again.hash == reference.hash == references.content_hash(builders.source(digits(), "train"))
    )
    for name, value in reference.moments.items():
        assert again.moments[name].scatter.tobytes() == value.scatter.tobytes()
    # One that was cut off is made anew.
    kept = next(cache.glob("*.npz"))
    kept.write_bytes(kept.read_bytes()[:1000])
    assert judged(network, held, cache)[0] == real


def test_kept_weights_are_read_again(network, cache):
    config = digits()
    training = builders.source(config, "train")
    said = []
    found, _ = feature_network("self", config, training, cache / "own", said.append)
    assert found.weights_hash == network.weights_hash
    assert not said


def test_published_statistics_load(network, tmp_path):
    held = next(references.pictures(builders.source(digits(), "validation")))[0]
    _, reference = judged(network, held, tmp_path)
    moments = reference.moments["features"]
    path = tmp_path / "digits.npz"
    np.savez(path, mu=moments.mean, sigma=moments.covariance, mu_s=[0.0, 1.0], sigma_s=np.eye(2))
    found = references.of_file(path)
    np.testing.assert_allclose(found.moments["features"].covariance, moments.covariance)
    assert found.moments["spatial"].mean.shape == (2,)
    assert len(found.hash) == 16
    with pytest.raises(ConfigError, match=r"kid: digits\.npz holds statistics alone"):
        metrics.scores(["kid"], _some(network, held), found, network)


def _some(network, pixels):
    part = collected.Collected(len(pixels))
    part.add(pixels, Extractor(network, make_mesh()))
    return part


def test_samples_that_are_no_numbers_are_counted_and_left_out(network, tmp_path):
    held = next(references.pictures(builders.source(digits(), "validation")))[0]
    _, reference = judged(network, held, tmp_path)
    finite = np.arange(len(held)) % 5 > 0
    part = collected.Collected(len(held))
    part.add(held, Extractor(network, make_mesh()), None, finite)
    found = metrics.scores(["fd"], part, reference, network)[0]
    assert found.estimate.n == finite.sum()
    assert f"{(~finite).sum()} samples not finite, left out" in found.remark
    alone = _some(network, held[finite])
    np.testing.assert_allclose(
        found.estimate.value, metrics.scores(["fd"], alone, reference, network)[0].estimate.value
    )
    none = collected.Collected(3)
    none.add(held[:3], Extractor(network, make_mesh()), None, np.zeros(3, bool))
    with pytest.raises(ConfigError, match="none of 3 samples is finite"):
        none.features()


def test_grey_and_coloured_pictures():
    grey = np.arange(8, dtype=np.uint8).reshape(1, 2, 4, 1)
    assert three_channels(grey).shape == (1, 2, 4, 3)
    for bad in (grey[..., 0], grey.astype(np.float32), np.zeros((1, 2, 2, 4), np.uint8)):
        with pytest.raises(ConfigError, match="feature networks read uint8 pictures"):
            three_channels(bad)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"metrics": ["fdd"]}, "metrics='fdd' is unknown .did you mean 'fd'"),
        ({"metrics": []}, "metrics=..: expected some of"),
        ({"metrics": ["fid"]}, "metrics=fid: FID is that of the Inception network, not of"),
        ({"num": 10}, "num=10: fd needs at least 20 samples"),
        ({"num": 0}, "num=0: expected at least 1"),
        ({"reference": "test"}, "reference='test' is unknown"),
        ({"reference": "none.npz"}, "reference='none.npz': there is no such file"),
        ({"features": "dino"}, "features='dino' is unknown"),
        ({"features": "self:x"}, "features='self:x': this network learns from the data"),
        ({"metrics": ["sfid"], "num": 20}, "'spatial' are not among the features"),
        ({"split": "test"}, "split='test' is unknown"),
        ({"solver": "dim"}, "solver='dim' is unknown .did you mean 'ddim'"),
        ({"seed": -1}, "seed=-1: expected"),
        ({"labels": [77]}, "labels=77: out of range"),
        ({"prompts": ["a cat"]}, "the model is not conditioned by text"),
        ({"metrics": ["loss"], "steps": 3}, "steps=3: metrics=loss do not read it"),
        ({"bpd": {"draws": 8}}, "bpd_options=.*: metrics=fd do not read it"),
        ({"split": "train"}, "split='train': metrics=fd do not read it"),
        ({"metrics": ["clip_score"]}, "clip_score: features='self' has no text tower"),
    ],
)
def test_mistakes_are_one_line(run, arguments, words):
    arguments = {"metrics": ["fd"], "num": 20, **arguments}
    chosen = arguments.pop("metrics")
    before = (run / "eval.jsonl").read_text() if (run / "eval.jsonl").exists() else ""
    said = []
    with pytest.raises(ConfigError, match=words) as raised:
        inspect.unwrap(api.evaluate)(run, chosen, note=said.append, **arguments)
    assert "\n" not in str(raised.value)
    assert not said, "refused before anything is learned or read"
    after = (run / "eval.jsonl").read_text() if (run / "eval.jsonl").exists() else ""
    assert after == before


def test_points_have_no_pictures(tmp_path):
    diffusion_jax.train(points(), tmp_path / "run")
    with pytest.raises(ConfigError, match="metrics=fd: the data are points, no pictures; expected"):
        api.evaluate(tmp_path / "run", ["fd"], num=20)
    with pytest.raises(ConfigError, match="run2 does not exist"):
        api.evaluate(tmp_path / "run2", ["bpd"])


def test_a_line_that_was_cut_off_is_passed_over(tmp_path):
    row = {"score": "FD-self", "value": float("inf"), "n": 3}
    report.append(tmp_path, [row])
    with (tmp_path / "eval.jsonl").open("a") as file:
        file.write('{"score": "FD-')
    report.append(tmp_path, [{**row, "n": 4}])
    assert [found["n"] for found in report.read(tmp_path)] == [3, 4]
    assert report.read(tmp_path)[0]["value"] == "inf"
    assert (tmp_path / "eval.md").read_text().count("FD-self") == 2


def test_conditions_are_those_of_the_data(run, monkeypatch):
    """Samples have the classes that the training examples have, unless others are asked for."""
    asked = []
    inner = PixelPipeline.stream

    def stream(self, num, **options):
        # Options are judged by one sample beforehand.
        asked.extend([options] if num > 1 else [])
        return inner(self, num, **options)

    monkeypatch.setattr(PixelPipeline, "stream", stream)
    few = np.flatnonzero(np.arange(1400) % 7 == 0)
    whole = builders.source

    def source(config, split):
        return Part(whole(config, split), few[:190] if split == "train" else np.arange(50))

    monkeypatch.setattr(builders, "source", source)
    row = api.evaluate(run, ["fd"], num=300)[0]
    labels = Part(whole(digits(), "train"), few[:190]).fetch(np.arange(190))["conditioning"]
    expected = np.bincount(labels["label"], minlength=10)
    np.testing.assert_array_equal(np.bincount(asked[0]["labels"], minlength=10), expected)
    assert row["conditions"]
    row = api.evaluate(run, ["fd"], num=20, labels=[3])[0]
    assert asked[1]["labels"] == [3]
    assert row["conditions"] == ""


def test_a_folder_of_other_pictures_is_the_reference(run, tmp_path):
    """They are made like the samples, and the report says so."""
    random = np.random.default_rng(0)
    for number in range(30):
        pixels = random.integers(0, 255, (24, 32, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    row = api.evaluate(run, ["fd"], num=20, reference=tmp_path)[0]
    assert row["reference"] == f"folder {tmp_path.name} (made 8 x 8, grey)"
    assert row["reference_count"] == 30
    for number in range(1, 30):
        (tmp_path / f"{number}.png").unlink()
    with pytest.raises(ConfigError, match="expected a folder of two pictures or more") as raised:
        api.evaluate(run, ["fd"], num=20, reference=tmp_path)
    assert str(raised.value).startswith(f"reference={str(tmp_path)!r}: ")


def test_the_held_out_split_is_warned_of(run):
    said = []
    rows = api.evaluate(run, ["fd"], num=20, reference="validation", note=said.append)
    assert any("Warning: reference='validation' is what this run holds out" in one for one in said)
    assert rows[0]["reference_count"] == 397


def test_the_step_that_was_loaded_is_the_one_that_is_reported(run, monkeypatch):
    """A training may save another meanwhile."""
    steps = iter([4, 8, 8])
    monkeypatch.setattr(evaluations, "_newest", lambda path: next(steps))
    assert api.evaluate(run, ["fd"], num=20)[0]["step"] == 4


def test_what_else_decides_the_samples_is_reported(run):
    guided = {"guidance": 2.0, "guidance_by": "autoguidance", "guidance_interval": (0.1, 0.9)}
    loading = {"weak": str(run), "weak_ema": ""}
    row = api.evaluate(run, ["fd"], num=20, labels=[3], loading=loading, **guided)[0]
    for part in ("guidance_by='autoguidance'", "guidance_interval=(0.1, 0.9)", "labels=[3]"):
        assert part in row["sampling"]
    assert "threshold='static'" in row["sampling"]
    assert row["weak"] == f"weak={str(run)!r}"
    assert "guidance" not in api.evaluate(run, ["fd"], num=20)[0]["sampling"]
