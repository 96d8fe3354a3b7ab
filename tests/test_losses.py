"""The training objective of a trained workdir on held-out data, by noise level."""

from __future__ import annotations

import inspect
import json

import numpy as np
import pytest
from toys import changed, one_device, tiny

import diffusion_jax
from diffusion_jax import api, builders, sweeps, workdir
from diffusion_jax.data.part import Part
from diffusion_jax.errors import ConfigError

BINS = [
    *("-inf to -6", "-6 to -4", "-4 to -2", "-2 to 0", "0 to 2", "2 to 4", "4 to 6", "6 to inf"),
]


pytestmark = pytest.mark.usefixtures("quick_programs")


def points():
    """46 held-out examples, 40 of which the training validates on."""
    config = tiny(
        data__points__size=64,
        data__points__held_out=46,
        validation__examples=40,
        validation__batch_size=16,
        steps=3,
        optimizer__learning_rate=0.05,
    )
    with config.ema.decays.unlocked():
        config.ema.decays.long = 0.9
    return config


def bound():
    """The bound in continuous time, under a learned schedule."""
    config = tiny(data__points__held_out=24, validation__examples=24, objective__name="variational")
    config.objective.variational.num_steps = 0
    config.process.gaussian.schedule.name = "learned"
    config.process.gaussian.schedule.learned.units = 4
    return config


def letters():
    config = changed(tiny(), data__name="markov", network__name="dit", validation__examples=24)
    config.data.markov.update(states=5, length=6, size=64, held_out=24)
    config.process.name, config.objective.name = "masked", "continuous"
    config.objective.continuous.bound_steps = 2
    config.network.update(noise_input="t", token_dim=8)
    config.network.dit.update(patch=1, dim=16, depth=1, heads=2, positions="rope")
    config.sampling.solver = "ancestral"
    return config


def begun(config, folder):
    """The workdir of a run that saved its first state, and what it logs of that."""
    with one_device():
        run = api.Run.build(config, folder)
        state = run.compiled.init()
        run.save(state, 0)
        run._saves.close()
        workdir.write_config(folder, run.config, run.model.spec, len(run.train_data), run.train_ids)
        run.held.release()
        return run._validate(state, 0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("losses") / "run"
    with one_device():
        diffusion_jax.train(points(), folder)
    return folder


def logged(folder):
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in read if "val/loss" in row][-1]


def by_name(folder, num, **options):
    rows = api.evaluate(folder, ["loss"], num=num, **options)
    return {row["score"]: row for row in rows}


@pytest.mark.parametrize("ema", [None, "", "long"])
def test_it_is_what_the_training_logged(run, ema):
    # On eight devices, and in other batches than the training had.
    found = by_name(run, 40, loading={"ema": ema})
    suffix = {None: "_ema", "": "", "long": "_ema_long"}[ema]
    expected = logged(run)
    assert found["loss"]["value"] == pytest.approx(expected[f"val/loss{suffix}"], rel=1e-5)
    names = {"loss": f"val/loss{suffix}"}
    for title in BINS:
        low, high = (f"{float(end):+.0f}" for end in title.split(" to "))
        name = f"val/loss_logsnr/{low}..{high}{suffix}"
        if name in expected:
            names[f"loss at logsnr {title}"] = name
    assert len(names) > 6
    # The noisiest first, and none that is empty.
    assert list(found) == list(names)
    for title, name in names.items():
        assert found[title]["value"] == pytest.approx(expected[name], rel=1e-5)


def test_bins_make_up_the_whole_and_have_error_bars(run):
    found = by_name(run, 10_000)
    whole = found.pop("loss")
    assert whole["n"] == sum(row["n"] for row in found.values()) == 46
    total = sum(row["n"] * row["value"] for row in found.values())
    assert whole["value"] == pytest.approx(total / 46)

    # The variance of all is that within the bins and between them.
    def squares(row):
        deviation = row["standard_error"] ** 2 * row["n"] if row["n"] > 1 else 0.0
        return deviation * (row["n"] - 1)

    between = sum(row["n"] * (row["value"] - whole["value"]) ** 2 for row in found.values())
    within = sum(squares(row) for row in found.values())
    assert squares(whole) == pytest.approx(between + within)
    assert all(row["standard_error"] > 0.0 for row in found.values())
    assert (whole["step"], whole["seed"], whole["ema"]) == (3, 0, "default")
    assert (whole["reference"], whole["remark"]) == ("points validation", "objective denoising")
    lines = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    assert [line["score"] for line in lines[-len(found) - 1 :]] == ["loss", *found]


def test_num_and_split_choose_the_examples(run):
    few, train = by_name(run, 5), by_name(run, 40, split="train")
    assert few["loss"]["n"] == sum(row["n"] for name, row in few.items() if name != "loss") == 5
    assert train["loss"]["reference"] == "points train"
    assert train["loss"]["value"] != pytest.approx(by_name(run, 40)["loss"]["value"], rel=1e-3)
    # The sampler's seed has no part in it.
    assert by_name(run, 5, seed=7)["loss"]["value"] == few["loss"]["value"]


@pytest.mark.parametrize("config", [bound, letters], ids=lambda config: config.__name__)
def test_other_objectives_have_a_loss_without_bins(config, tmp_path):
    expected = begun(config(), tmp_path / "run")
    found = by_name(tmp_path / "run", 24)
    assert list(found) == ["loss"]
    assert found["loss"]["value"] == pytest.approx(expected["val/loss_ema"], rel=1e-5)
    assert found["loss"]["n"] == 24
    assert found["loss"]["remark"] == f"objective {config().objective.name}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"metrics": ["los"]}, "metrics='los' is unknown .did you mean 'loss'"),
        ({"split": "validate"}, "split='validate' is unknown .did you mean 'validation'"),
        ({"num": 0}, "num=0: expected at least 1"),
        ({"metrics": ["loss", "fd"]}, "metrics=fd: the data are points, no pictures; .* bpd or lo"),
    ],
)
def test_mistakes_are_one_line(run, arguments, words):
    arguments = {"metrics": ["loss"], **arguments}
    with pytest.raises(ConfigError, match=words) as raised:
        inspect.unwrap(api.evaluate)(run, arguments.pop("metrics"), **arguments)
    assert "\n" not in str(raised.value)


def test_a_sweep_of_samplers_has_no_loss(run):
    with pytest.raises(ConfigError, match="metrics=loss: the sampler has no part in it; leave it"):
        sweeps.sweep(run, {"steps": [1, 2]}, ["loss"])


def test_a_split_without_examples_is_one_line(run, monkeypatch):
    whole = builders.source(workdir.read_config(run), "validation")
    none = Part(whole, np.zeros(0, np.int64))
    monkeypatch.setattr(builders, "source", lambda config, split: none)
    with pytest.raises(ConfigError, match=r"^split='validation': points has no examples there for"):
        by_name(run, 5)
