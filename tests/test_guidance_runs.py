"""Kinds of guidance and time grids by config and from a trained workdir, with a real network."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest
import quick
from toys import changed, one_device

import diffusion_jax
from diffusion_jax import api, builders
from diffusion_jax import config as configs
from diffusion_jax.diffusion import time_grids
from diffusion_jax.errors import ConfigError
from diffusion_jax.pipelines.guidance_kinds import KINDS


def small(**changes):
    """A DiT of one block on digits; `a__b=v` sets `config.a.b`."""
    config = configs.base()
    config.data.name, config.network.name = "digits", "dit"
    config.network.dit.update({"dim": 16, "heads": 2, "depth": 1, "expansion": 1, "patch": 4})
    config.steps, config.batch_size, config.optimizer.warmup_steps = 3, 8, 1
    config.optimizer.learning_rate = 0.05
    config.checkpoint.update({"every": 1, "keep_last": 3})
    config.validation.examples = 0
    config.logging.tensorboard = False
    config.sampling.update({"num": 4, "steps": 2, "solver": "ddim", "threshold": "none"})
    return changed(config, **changes)


@pytest.fixture(scope="module", autouse=True)
def _quick(quick_programs):
    with one_device():
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("guided") / "run"
    api.train(small(), path)
    return path


def test_every_kind_samples_from_a_workdir(run):
    pipeline = diffusion_jax.load(run, weak=run, weak_step=1, weak_ema="")
    drawn = {"none": pipeline.sample(4, seed=1, batch_size=4).x.astype(float)}
    for kind in KINDS:
        samples = pipeline.sample(4, seed=1, batch_size=4, guidance=4.0, guidance_by=kind)
        assert samples.x.shape == (4, 8, 8, 1)
        drawn[kind] = samples.x.astype(float)
    # Each is another guidance; by more than the rounding of one to 8 bits.
    for one, other in itertools.combinations(drawn, 2):
        assert np.abs(drawn[one] - drawn[other]).max() > 1, (one, other)


def test_a_weak_model_that_is_none(run):
    with pytest.raises(ConfigError, match=r"^weak=.*nothing does not exist"):
        diffusion_jax.load(run, weak=run / "nothing")
    with pytest.raises(ConfigError, match="no weaker model is given"):
        diffusion_jax.load(run).sample(2, guidance=2.0, guidance_by="autoguidance")


B, GRID = "sampling__guidance_by__", "sampling__grid__"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({f"{B}name": "agp"}, ["config.sampling.guidance_by.name='agp'", "did you mean 'apg'"]),
        (
            {f"{B}name": "apg", f"{B}apg__momentum": 1.5, "sampling__guidance": 2.0},
            ["config.sampling.apg.momentum=1.5 must lie"],
        ),
        (
            {f"{B}name": "autoguidance", "sampling__guidance": 2.0},
            ["guidance_by.autoguidance.workdir='': expected the workdir", "trained already"],
        ),
        (
            {f"{B}name": "autoguidance", f"{B}autoguidance__workdir": "/nothing/there"},
            ["config.sampling.guidance_by.autoguidance.", "/nothing/there"],
        ),
        (
            {f"{GRID}name": "beta", f"{GRID}beta__a": 0.0},
            ["config.sampling.grid.beta.a=0.0; expected a positive"],
        ),
        ({f"{GRID}name": "given"}, ["grid.given.times=(): times has shape (0,)"]),
        (
            {f"{GRID}name": "given", f"{GRID}given__times": (1.0, 0.0)},
            ["grid.given.times=(1.0, 0.0): 2 times for steps=2; expected 3"],
        ),
        (
            {f"{GRID}name": "shifted", f"{GRID}shifted__terminal": 1.0},
            ["config.sampling.grid.shifted.terminal=1.0; expected a time"],
        ),
        (
            {f"{GRID}name": "leading", "sampling__steps": 1001},
            ["config.sampling.steps=1001; expected between"],
        ),
    ],
    ids=lambda v: ",".join(v),
)
def test_bad_fields(changes, words, tmp_path):
    with pytest.raises(ConfigError) as error:
        api.Run.build(small(**changes), tmp_path / "run")
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("trailing", {}, time_grids.trailing(1000, 4)),
        ("leading", {"offset": 1}, time_grids.leading(1000, 4, offset=1)),
        ("linspace", {}, time_grids.linspace(1000, 4)),
        ("given", {"times": (1.0, 0.8, 0.4, 0.2, 0.0)}, np.array([1.0, 0.8, 0.4, 0.2, 0.0])),
        # Four times the numbers that the shift is meant for: twice the odds.
        ("shifted", {"base_size": 16}, time_grids.shifted(time_grids.uniform(4), 2.0)),
    ],
)
def test_grids_by_config(name, options, expected):
    config = small(**{f"{GRID}name": name, "sampling__steps": 4})
    config.sampling.grid[name].update(options)
    spec = builders.source(config, "train").spec
    times = builders.time_grid(config, builders.model(config, spec))(4)
    np.testing.assert_allclose(times, expected, rtol=1e-12)


@pytest.mark.parametrize("name", ["exponential", "beta", "karras"])
def test_grids_of_levels_end_at_the_data(name):
    config = small(**{f"{GRID}name": name})
    model = builders.model(config, builders.source(config, "train").spec)
    times = builders.time_grid(config, model)(4)
    assert (len(times), times[-1]) == (5, 0.0)
    levels = model.schedule.sigma(times[:-1]) / model.schedule.alpha(times[:-1])
    assert levels[-1] == pytest.approx(0.002, rel=1e-6)


def test_the_perturbed_network_has_the_same_parameters():
    """With patches of a quarter of the picture, each sees itself alone: changing one changes no
    other."""
    config = small()
    model = builders.model(config, builders.source(config, "train").spec)
    perturbed = model.perturbed()
    shapes = [
        jax.eval_shape(network.init, jax.random.key(0)) for network in (model.network, perturbed)
    ]
    assert jax.tree.structure(shapes[0]) == jax.tree.structure(shapes[1])
    params = jax.device_put(quick.drawn(model.network.init, 0.3))
    x = quick.normal(2, 8, 8, 1)
    other = x.at[:, :4, :4].add(1.0)
    noise = jax.numpy.zeros(2)
    for network, mixes in ((model.network, True), (perturbed, False)):
        apply = quick.jit(lambda x, network=network: network.apply(params, x, noise, {}))
        moved = apply(other) - apply(x)
        assert np.abs(moved[:, :4, :4]).max() > 1e-3
        assert (np.abs(moved[:, 4:]).max() > 1e-5) == mixes
