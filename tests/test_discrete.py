"""Masked and uniform diffusion from config to samples: training, resuming, guidance, mistakes."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

import diffusion_jax
from diffusion_jax import builders, config_rules
from diffusion_jax import config as configs
from diffusion_jax.errors import ConfigError
from diffusion_jax.pipelines import output

pytestmark = pytest.mark.usefixtures("quick_programs")


def letters(process="masked", objective="continuous"):
    config = configs.base()
    config.data.name = "markov"
    config.data.markov.update(states=5, length=6, size=64, held_out=16)
    config.process.name = process
    config.objective.name = objective
    config.objective.variational.num_steps = 4
    config.objective.continuous.bound_steps = 4
    config.network.name = "dit"
    config.network.noise_input = "t"
    config.network.token_dim = 8
    config.network.dit.update(patch=1, dim=16, depth=1, heads=2, positions="rope")
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = 0
    config.steps, config.batch_size = 4, 16
    config.logging.update(every=2, tensorboard=False)
    config.checkpoint.every = 2
    config.validation.examples = 16
    config.sampling.update(solver="ancestral", steps=3, num=4, batch_size=4)
    return config


def pictures():
    config = letters()
    config.data.name = "digits"
    config.data.digits.binarise = True
    config.objective.continuous.label_dropout = 0.2
    config.network.dit.update(patch=2, positions="sincos")
    return config


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("process", ["masked", pytest.param("uniform", marks=pytest.mark.slow)])
def test_a_resumed_run_ends_where_one_left_in_peace_does(tmp_path, process):
    objective = "continuous" if process == "masked" else "variational"
    config = letters(process, objective)
    whole = diffusion_jax.train(config, tmp_path / "whole")
    config.steps = 2
    diffusion_jax.train(config, tmp_path / "parts")
    config.steps = 4
    resumed = diffusion_jax.train(config, tmp_path / "parts")
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    values = {k: v for row in rows(tmp_path / "whole") for k, v in row.items()}
    # An untrained network takes all five letters for equally likely. Masked, that costs log2(5)
    # bits each, from 16 examples at times of their own; uniform in four steps, where each example
    # has one of them, 3.73 +- .02 (`variational_bound` of equal chances).
    assert 0.0 < values["val/loss_ema"] < {"masked": 3.5, "uniform": 3.79}[process]
    # The four steps of training take off a little.
    equal = 6 * {"masked": np.log2(5), "uniform": 3.73}[process]
    assert 0.0 < values["val/bound_bits_stderr"] < 0.1 * equal
    error = 3 * values["val/bound_bits_stderr"]
    assert 0.95 * equal - error < values["val/bound_bits"] < equal + error

    pipeline = diffusion_jax.load(tmp_path / "parts")
    samples = pipeline.sample(5, seed=3, batch_size=5)
    assert samples.x.shape == (5, 6)
    assert samples.x.dtype == np.int32
    assert samples.x.min() >= 0
    assert samples.x.max() < 5
    for size in (1, 3):
        np.testing.assert_array_equal(pipeline.sample(5, seed=3, batch_size=size).x, samples.x)
    output.write(output.prepare(tmp_path / "out"), samples, pipeline.spec)
    texts = (tmp_path / "out" / "samples.txt").read_text().splitlines()
    assert texts == ["".join(" abcd"[token] for token in row) for row in samples.x]
    preview = (tmp_path / "whole" / "samples" / "00000004.txt").read_text()
    assert len(preview.splitlines()) == 4


@pytest.mark.slow
def test_pictures_of_tokens_with_labels_and_guidance(tmp_path):
    config = pictures()
    config.steps, config.validation.examples = 1, 0
    diffusion_jax.train(config, tmp_path / "run")
    pipeline = diffusion_jax.load(tmp_path / "run")
    samples = pipeline.sample(3, labels=[7, 1], guidance=2.0, trajectory=True)
    assert samples.label.tolist() == [7, 1, 7]
    assert set(np.unique(samples.x)) <= {0, 1}
    assert (samples.trajectory[0] == 2).all()  # masks
    out = output.prepare(tmp_path / "out")
    output.write(out, samples, pipeline.spec)
    names = {path.name for path in out.iterdir()}
    images = {f"0000{i}.png" for i in range(3)}
    assert names == {"samples.npz", "grid.png", "trajectory.gif", *images}
    image = np.asarray(Image.open(out / "00001.png").convert("L"))
    np.testing.assert_array_equal(image, samples.x[1] * 255)
    with pytest.raises(ConfigError, match=r"guidance_rescale=0\.5"):
        pipeline.sample(2, guidance=2.0, guidance_rescale=0.5)
    with pytest.raises(ConfigError, match="expected 'ancestral'"):
        pipeline.sample(2, solver="ddim")


def changed(base, changes):
    config = base()
    for path, value in changes.items():
        config.update_from_flattened_dict({path: value})
    return config


def build(config):
    config_rules.validate(config)
    model = builders.model(config, builders.source(config, "train").spec)
    builders.pipeline(config, model, {}, builders.sampling_mesh(config))


@pytest.mark.parametrize(
    ("base", "changes", "words"),
    [
        (letters, {"process.name": "gaussian"}, "tokens need the process 'masked' or 'uniform'"),
        (letters, {"process.name": "binomial"}, "config.data.name='markov': .* needs data of bits"),
        (letters, {"process.name": "uniform"}, "'continuous': .*'uniform' needs 'variational'"),
        (letters, {"objective.name": "denoising"}, "needs 'variational' or 'continuous'"),
        (letters, {"network.noise_input": "logsnr"}, "config.network.noise_input='logsnr'.* 't'"),
        (letters, {"network.name": "mlp"}, "config.network.name='mlp': tokens need one of dit"),
        (letters, {"network.token_dim": 0}, "config.network.token_dim=0: expected at least 1"),
        (letters, {"process.masked.keep": "cosin"}, "config.process.masked.keep.*'cosine'"),
        (letters, {"network.dit.patch": 4}, r"config\.network\.dit\.patch=4 does not divide"),
        (letters, {"sampling.threshold": "static"}, "tokens are not clipped"),
        (letters, {"sampling.grid.name": "karras"}, "expected 'uniform'"),
        (letters, {"objective.continuous.bound_steps": -1}, "bound_steps=-1: expected at least 0"),
        (pictures, {"data.digits.binarise": False}, "config.data.name='digits': .* data of tokens"),
        (configs.base, {"objective.name": "continuous"}, "'gaussian' needs 'denoising' or"),
        (configs.base, {"process.name": "masked"}, "config.data.name='digits': .* data of tokens"),
    ],
)
def test_what_does_not_go_together_is_one_line(base, changes, words):
    config = changed(base, changes)
    with pytest.raises(ConfigError, match=words) as raised:
        build(config)
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith("config.")


def test_the_keep_and_the_bound_of_the_config_arrive():
    config = changed(letters, {"process.masked.keep": "cosine"})
    model = builders.model(config, builders.source(config, "train").spec)
    assert model.process == dataclasses.replace(model.process, vocabulary=5)
    assert abs(model.process.keep(0.5) - (1.0 - 0.5**0.5)) < 1e-12
    assert builders.bound_steps(config) == 4
    assert builders.bound_steps(configs.base()) == 0
