"""The weaker model of autoguidance: which one is loaded, and what is said where it cannot be."""

from __future__ import annotations

import inspect
import json
import re
import shutil

import jax
import numpy as np
import pytest
from toys import changed, moons, one_device

import diffusion_jax
from diffusion_jax import api
from diffusion_jax.errors import ConfigError

FIELD = "config.sampling.guidance_by.autoguidance"


@pytest.fixture(scope="module", autouse=True)
def _quick(quick_programs):
    with one_device():
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run with three steps, and one of one step that it is to guide; not to be changed."""
    folder = tmp_path_factory.mktemp("weak")
    api.train(moons(steps=3, checkpoint__every=1, checkpoint__keep_last=3), folder / "weak")
    api.train(guided_by(folder / "weak"), folder / "strong")
    return folder


def guided_by(path, **changes):
    config = moons(sampling__guidance=2.0, sampling__guidance_by__name="autoguidance")
    config.sampling.guidance_by.autoguidance.workdir = str(path)
    return changed(config, **changes)


@pytest.fixture
def gone(runs, tmp_path):
    """A run whose weaker model is no longer there; (it, where that was)."""
    shutil.copytree(runs / "strong", tmp_path / "strong")
    text = (tmp_path / "strong" / "config.json").read_text()
    was = tmp_path / "moved"
    changed_text = text.replace(str(runs / "weak"), str(was))
    assert changed_text != text
    (tmp_path / "strong" / "config.json").write_text(changed_text)
    return tmp_path / "strong", was


def same(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in pairs)


def test_a_step_or_an_average_alone_is_of_the_weaker_model_that_the_config_names(runs, tmp_path):
    strong, weak, own_step = runs / "strong", runs / "weak", tmp_path / "own"
    shutil.copytree(weak, own_step)
    described = json.loads((own_step / "config.json").read_text())
    by = described["config"]["sampling"]["guidance_by"]
    by["name"], by["autoguidance"]["step"] = "autoguidance", 1
    (own_step / "config.json").write_text(json.dumps(described))
    for choice in ({"weak_step": 1}, {"weak_ema": ""}):
        expected = diffusion_jax.load(strong, weak=weak, **choice).weak.params
        assert same(diffusion_jax.load(strong, **choice).weak.params, expected)
        assert not same(diffusion_jax.load(strong).weak.params, expected)
    # One that the config names by its step alone: the average goes over the config's.
    expected = diffusion_jax.load(weak, weak=weak, weak_step=1, weak_ema="").weak.params
    assert same(diffusion_jax.load(own_step, weak_ema="").weak.params, expected)
    # A config that names none: of the run itself.
    raw = diffusion_jax.load(weak, ema="").params
    assert same(diffusion_jax.load(weak, weak_ema="").weak.params, raw)
    with pytest.raises(ConfigError, match=r"^weak_step=1: weak='' leaves out the weaker model"):
        diffusion_jax.load(strong, weak="", weak_step=1)


def test_a_weaker_model_that_is_gone_is_missed_where_it_is_needed(gone):
    path, was = gone
    where = re.escape(f"{FIELD}.workdir={was} does not exist; name another")
    with pytest.raises(ConfigError, match=where + r" with weak=.*or weak='' \(--weak=\)"):
        diffusion_jax.load(path)
    with pytest.raises(ConfigError, match=where + r", or config.*name='classifier_free'$"):
        api.train(guided_by(was, steps=2), path)
    assert diffusion_jax.load(path, weak="").sample(2, guidance=1.0).x.shape == (2, 2)
    assert diffusion_jax.bits_per_dim(path, num=4).bits.n == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"weak_step": 7}, "weak_step=7 is not among the checkpoints"),
        ({"weak_step": "x"}, "weak_step='x': expected a whole number"),
        ({"weak_ema": "long"}, "weak_ema='long' is unknown"),
        ({"weak": "weak", "weak_step": 7}, "weak_step=7 is not among the checkpoints"),
        ({"weak": "weak", "weak_ema": "long"}, "weak_ema='long' is unknown"),
        ({"weak": "none"}, "weak=none does not exist; expected that of a weaker model"),
    ],
)
def test_errors_of_the_weaker_model_name_its_arguments(runs, arguments, words, monkeypatch):
    monkeypatch.chdir(runs)
    with pytest.raises(ConfigError, match=f"^{words}") as raised:
        # The check of annotations that the tests turn on would come first.
        inspect.unwrap(diffusion_jax.load)("strong", **arguments)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"step": 7}, "step=7 is not among the checkpoints"),
        ({"ema": "long"}, "ema='long' is unknown"),
    ],
)
def test_errors_of_the_weaker_model_name_the_fields_of_the_config(runs, choice, words, tmp_path):
    config = guided_by(runs / "weak")
    config.sampling.guidance_by.autoguidance.update(choice)
    with pytest.raises(
        ConfigError, match=f"^{re.escape(FIELD)}.{words}.*; name another, or"
    ) as raised:
        api.Run.build(config, tmp_path / "run")
    assert "\n" not in str(raised.value)


def test_a_damaged_weaker_model_is_told_from_the_run(runs, tmp_path):
    weak = tmp_path / "weak"
    weak.mkdir()
    shutil.copy(runs / "weak" / "config.json", weak)
    with pytest.raises(ConfigError, match=rf"^weak='{weak}': checkpoints .*weak='' ") as raised:
        diffusion_jax.load(runs / "strong", weak=weak)
    assert "\n" not in str(raised.value)


def test_a_weaker_model_that_never_saw_no_label_needs_one(runs, tmp_path):
    """The model reads no labels: the weaker one would be evaluated as it never was in training."""
    always, plain = tmp_path / "always", tmp_path / "plain"
    api.train(moons(objective__denoising__label_dropout=0.0), always)
    api.train(moons(network__use_labels=False), plain)
    words = r"^weak='.*always': it was trained with label_dropout=0 and has no prediction without"
    with pytest.raises(ConfigError, match=words) as raised:
        diffusion_jax.load(plain, weak=always)
    assert "\n" not in str(raised.value)
    # One that was trained without labels, too, may guide it; and it may guide one that has labels.
    assert diffusion_jax.load(plain, weak=runs / "weak").weak.conditions == ()
    assert diffusion_jax.load(runs / "strong", weak=always).weak.conditions == ("label",)
