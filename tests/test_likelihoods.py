"""Bits per dimension of trained workdirs, and training with a learned schedule, by config."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

import diffusion_jax
from diffusion_jax import builders, config_rules
from diffusion_jax import config as configs
from diffusion_jax.diffusion.broadcasting import expand
from diffusion_jax.diffusion.denoiser import Denoised, Denoiser
from diffusion_jax.errors import ConfigError


def points():
    config = configs.base()
    config.data.name = "points"
    config.data.points.update(distribution="swiss_roll", size=256, held_out=64)
    config.network.name = "mlp"
    config.network.mlp.update(width=16, depth=1)
    config.optimizer.warmup_steps = 0
    config.steps, config.batch_size = 4, 32
    config.logging.update(every=2, tensorboard=False)
    config.validation.examples = 32
    config.sampling.update(steps=3, num=4, batch_size=4)
    return config


def digits():
    config = points()
    config.data.name = "digits"
    config.network.name = "dit"
    config.network.dit.update(patch=4, dim=16, depth=1, heads=2)
    config.objective.name = "variational"
    config.objective.variational.num_steps = 0
    config.objective.variational.decoder.name = "pixels"
    config.objective.variational.decoder.pixels.count = 17
    config.process.gaussian.schedule.name = "learned"
    config.process.gaussian.schedule.learned.update(logsnr_max=9.0, units=4)
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits") / "run"
    return folder, diffusion_jax.train(digits(), folder)


def test_a_learned_schedule_is_trained_sampled_from_and_evaluated(run):
    folder, state = run
    first = builders.schedule(digits()).params
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max() > 0, state.params["schedule"], first)
    assert all(jax.tree.leaves(moved))
    assert state.ema["default"]["schedule"]["ends"]["logsnr_max"] != 9.0
    pipeline = diffusion_jax.load(folder)
    assert pipeline.sample(2, seed=1).x.shape == (2, 8, 8, 1)
    found = diffusion_jax.bits_per_dim(folder, num=40, draws=2)
    assert found.levels == 17
    assert found.bits_per_dim.n == 40
    # Knowing nothing costs log2(17) bits a pixel; the untrained network knows no more.
    assert 1.0 < found.bits_per_dim.value < 40.0
    assert 0.0 < found.bits_per_dim.standard_error < 1.0
    np.testing.assert_allclose(found.bits.value, 64 * found.bits_per_dim.value)
    total = sum(term.value for term in found.terms.values())
    np.testing.assert_allclose(total, found.bits_per_dim.value, rtol=1e-5)
    # Another batch size changes nothing; the pipeline with its data neither.
    source = builders.source(digits(), "validation")
    again = diffusion_jax.bits_per_dim(pipeline, source, num=40, draws=2, batch_size=16)
    np.testing.assert_allclose(again.bits_per_dim, found.bits_per_dim, rtol=1e-4)


def test_densities_of_points_by_all_methods_agree(tmp_path):
    diffusion_jax.train(points(), tmp_path / "run")
    pipeline = diffusion_jax.load(tmp_path / "run")
    # In place of the network, the exact denoiser of Gaussian data.
    width, schedule = 0.5, pipeline.schedule

    def exact(params, conditioning):
        def step(x, t, carry):
            alpha, sigma = expand(schedule.alpha(t), x), expand(schedule.sigma(t), x)
            return Denoised(alpha * width**2 * x / (alpha**2 * width**2 + sigma**2)), carry

        return Denoiser(step)

    pipeline = dataclasses.replace(pipeline, denoiser=exact)
    x = width * np.random.default_rng(0).normal(size=(200, 2))
    log2_p = -0.5 * (x / width) ** 2 - 0.5 * np.log(2 * np.pi * width**2)
    expected = -log2_p.mean() / np.log(2)
    flow = diffusion_jax.bits_per_dim(pipeline, x, method="flow", trace="exact", steps=40)
    assert abs(flow.bits_per_dim.value - expected) < 2e-3
    assert flow.levels == 0
    found = diffusion_jax.bits_per_dim(pipeline, x, method="continuous", draws=8).bits_per_dim
    assert abs(found.value - expected) < 3 * found.standard_error < 0.9
    # Steps cost something, most of it where logsnr falls fast: near the data.
    above = diffusion_jax.bits_per_dim(pipeline, x, method="discrete", steps=200).bits_per_dim
    assert -3 * above.standard_error < above.value - expected < 3.0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"methd": "flow"}, "option='methd' is unknown .did you mean 'method'"),
        ({"method": "flows"}, "method='flows' is unknown .did you mean 'flow'"),
        ({"split": "test"}, "split='test' is unknown"),
        ({"num": 0}, "num=0: expected at least 1"),
        ({"draws": 0}, "draws=0: expected at least 1"),
        ({"draws": 2, "method": "discrete"}, "draws=2: the method 'discrete' draws once"),
        ({"levels": 1}, "levels=1: expected 2 or more"),
        ({"levels": 16}, "levels=16 .given.: some pixels lie between"),
        ({"first_time": 1.0}, "first_time=1.0: expected a time between 0 and 1"),
        ({"examples": np.zeros((3, 8, 8))}, r"examples has shape \(3, 8, 8\); expected \[n, 8, 8"),
        ({"ema": "long"}, "ema='long' is unknown"),
    ],
)
def test_mistakes_of_an_evaluation_are_one_line(run, options, words):
    with pytest.raises(ConfigError, match=words) as raised:
        diffusion_jax.bits_per_dim(run[0], **{"num": 4, **options})
    assert "\n" not in str(raised.value)


def test_a_missing_workdir_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="none does not exist"):
        diffusion_jax.bits_per_dim(tmp_path / "none")


def build(config):
    config_rules.validate(config)
    builders.objective(config, builders.model(config, builders.source(config, "train").spec))


@pytest.mark.parametrize(
    ("base", "changes", "words"),
    [
        (digits, {"objective.name": "denoising"}, "objective.name='denoising': a learned schedule"),
        (digits, {"sampling.grid.name": "karras"}, "sampling.grid.name='karras'"),
        (digits, {"objective.variational.decoder.name": "pixel"}, "did you mean 'pixels'"),
        (digits, {"objective.variational.decoder.pixels.count": 1}, "count=1: expected at least 2"),
        (digits, {"process.gaussian.schedule.learned.units": 0}, "units=0: expected at least 1"),
        (digits, {"process.gaussian.schedule.learned.t_min": 1.0}, "t_min=1.0; expected a time"),
        (
            digits,
            {"process.gaussian.schedule.learned.logsnr_min": 10.0},
            "logsnr_min=10.0, logsnr_max=9.0; expected finite",
        ),
        (
            digits,
            {"process.gaussian.schedule.name": "cosine", "objective.variational.first_time": 0.0},
            "config.objective.variational.first_time=0.0; expected a time",
        ),
        (
            digits,
            {
                "process.gaussian.schedule.name": "cosine",
                "objective.variational.proposal": "logsnr",
            },
            "config.objective.variational.proposal='logsnr'",
        ),
    ],
)
def test_what_does_not_go_together_is_one_line(base, changes, words):
    config = base()
    for path, value in changes.items():
        config.update_from_flattened_dict({path: value})
    with pytest.raises(ConfigError, match=words) as raised:
        build(config)
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith("config.")


def test_bits_need_steps():
    config = configs.base()
    config.data.name = "heartbeat"
    config.process.name, config.network.name = "binomial", "mlp"
    config.network.noise_input = "t"
    config.objective.name = "variational"
    config.objective.variational.num_steps = 0
    with pytest.raises(ConfigError, match="num_steps=0: continuous time is for the process"):
        builders.objective(config, builders.model(config, builders.source(config, "train").spec))
