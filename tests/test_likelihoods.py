"""Bits per dimension of trained workdirs, and training with a learned schedule, by config."""

from __future__ import annotations

import dataclasses
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from toys import one_device

import diffusion_jax
from diffusion_jax import builders, config_rules, frozen, workdir
from diffusion_jax import config as configs
from diffusion_jax.data.arrays import ArraySource
from diffusion_jax.diffusion import schedules
from diffusion_jax.diffusion.broadcasting import expand
from diffusion_jax.diffusion.denoiser import Denoised, Denoiser
from diffusion_jax.diffusion.processes import Gaussian
from diffusion_jax.errors import ConfigError
from diffusion_jax.parallel.mesh import make_mesh


@pytest.fixture(scope="module", autouse=True)
def _quick(quick_programs):
    with one_device():
        yield


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
    # What training ended with: the untrained network costs more than log2(17) bits a pixel.
    assert abs(found.bits_per_dim.value - 6.3) < 3 * found.bits_per_dim.standard_error < 1.0
    np.testing.assert_allclose(found.bits.value, 64 * found.bits_per_dim.value)
    total = sum(term.value for term in found.terms.values())
    np.testing.assert_allclose(total, found.bits_per_dim.value, rtol=1e-5)
    # Another batch size changes nothing; the pipeline with its data neither.
    source = builders.source(digits(), "validation")
    again = diffusion_jax.bits_per_dim(pipeline, source, num=40, draws=2, batch_size=16)
    np.testing.assert_allclose(again.bits_per_dim, found.bits_per_dim, rtol=1e-4)


def steps_of_gaussian_data(schedule, width, times):
    """The expected bound in bits per dimension, with the exact denoiser of N(0, width^2)."""
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    left = width**2 * sigma**2 / (alpha**2 * width**2 + sigma**2)  # E |x0 - x0_hat|^2
    snr = (alpha[:-1] / sigma[:-1]) ** 2
    nats = 0.5 * ((snr[1:] - snr[:-1]) * left[:-2]).sum()
    nats += 0.5 * np.log(2 * np.pi * sigma[-2] ** 2) + 0.5 * left[-2] / sigma[-2] ** 2
    return (nats + Gaussian(schedule).prior_kl(np.array([width]))[0]) / np.log(2)


def test_densities_of_points_by_all_methods_agree():
    config = points()
    model = builders.model(config, builders.source(config, "train").spec)
    pipeline = builders.pipeline(config, model, {}, builders.mesh(config))
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
    found = diffusion_jax.bits_per_dim(pipeline, x, method="continuous", draws=32).bits_per_dim
    assert abs(found.value - expected) < 3 * found.standard_error < 0.4
    adaptive = diffusion_jax.bits_per_dim(
        pipeline, x, method="flow", trace="exact", solver="dopri5", rtol=1e-4, atol=1e-4
    )
    assert abs(adaptive.bits_per_dim.value - expected) < 2e-3
    # Steps cost something, most of it where logsnr falls fast: near the data.
    above = diffusion_jax.bits_per_dim(pipeline, x, method="discrete", steps=200).bits_per_dim
    known = steps_of_gaussian_data(schedule, width, np.linspace(1.0, 0.0, 201))
    assert known > expected + 1.0
    assert abs(above.value - known) < 3 * above.standard_error < 0.7


def held(spec, x):
    labels = np.zeros(len(x), np.int32)
    return ArraySource(spec=spec, x=x, example_ids=np.arange(len(x)), labels=labels)


def test_the_values_of_a_pixel_are_those_of_the_data_not_of_a_batch(run):
    """Found in the first examples of the source, whatever batch or number is asked for."""
    spec = workdir.read_spec(run[0])
    x = np.random.default_rng(0).integers(0, 17, (3, *spec.shape)).astype(np.float32) / 8 - 1
    x[0] = np.sign(x[0] + 0.01)  # alone it has two values
    found = [
        diffusion_jax.bits_per_dim(run[0], held(spec, x), num=num, batch_size=size)
        for num, size in ((3, 3), (3, 1), (1, 1))
    ]
    assert [one.levels for one in found] == [17, 17, 17]
    np.testing.assert_allclose(found[1].bits_per_dim, found[0].bits_per_dim, rtol=1e-4)
    # A value between them later on, of a source whose first examples have none.
    x = np.tile(x, (30, 1, 1, 1))
    x[80, 0, 0] += 0.01
    with pytest.raises(ConfigError, match=r"levels=17 .found in the first 64 examples.: some"):
        diffusion_jax.bits_per_dim(run[0], held(spec, x), batch_size=8)
    assert diffusion_jax.bits_per_dim(run[0], held(spec, x), num=80).bits_per_dim.n == 80


@pytest.mark.slow
def test_pixels_of_a_known_law_cost_their_entropy(run):
    """Pixels that are any of 17 values with equal chances, and their exact denoiser."""
    schedule, values = schedules.cosine(), np.linspace(-1.0, 1.0, 17).astype(np.float32)

    def exact(params, conditioning):
        def step(x, t, carry):
            alpha, sigma = expand(schedule.alpha(t), x), expand(schedule.sigma(t), x)
            far = (x[..., None] - alpha[..., None] * values) / sigma[..., None]
            return Denoised(jax.nn.softmax(-0.5 * far**2) @ values), carry

        return Denoiser(step)

    changes = {"denoiser": exact, "process": Gaussian(schedule), "schedule": schedule}
    pipeline = diffusion_jax.load(run[0])
    pipeline = dataclasses.replace(pipeline, **changes, process_of=None, conditions=())
    x = np.random.default_rng(1).choice(values, (64, 8, 8, 1))

    def bits(**options):
        return diffusion_jax.bits_per_dim(pipeline, x, **options).bits_per_dim

    entropy, found = np.log2(17), bits(draws=8)
    assert abs(found.value - entropy) < 3 * found.standard_error < 0.15
    # Equal steps in t cost something, twice as many half of it.
    few, many = (bits(method="discrete", steps=steps).value - entropy for steps in (200, 400))
    assert 0.2 < many < 0.3
    assert 1.9 < few / many < 2.4
    # Noise in the cells costs something, more draws of it less: that of the density which values
    # with the noise of the first time have, a sixth of their distance.
    width = values[1] - values[0]

    def log_mean(draws):
        random = np.random.default_rng(2)
        x0 = random.choice(values, (2000, 1, 64))
        far = x0 + width * random.uniform(-0.5, 0.5, (2000, draws, 64))
        share = [np.exp(-18.0 * ((far - v) / width) ** 2) for v in values]
        log_p = np.log(np.sum(share, 0) * 6.0 / (17.0 * np.sqrt(2.0 * np.pi))).sum(-1)
        found = -np.log2(np.exp(log_p - log_p.max(1, keepdims=True)).mean(1)) / 64
        return found - log_p.max(1) / (64 * np.log(2))

    for draws in (1, 4):
        flow = bits(method="flow", steps=40, draws=draws, trace="exact", num=32)
        assert abs(flow.value - log_mean(draws).mean()) < 3 * flow.standard_error < 0.15
    assert log_mean(4).mean() < log_mean(1).mean() - 0.15


def test_the_door_prints_bits_with_their_errors(start_door, run):
    started = [
        start_door("evaluate", f"--workdir={run[0]}", "--num=16", *more)
        for more in (
            ["--metrics=bpd", "--seed=3", "--bpd_options=draws=2,spread=independent"],
            ["--metrics=bpds"],
            ["--metrics=bpd", "--bpd_options=num=3"],
        )
    ]
    code, out, err = started[0].wait(120)
    assert code == 0, err
    said = re.search(r"^([0-9.]+) \+- ([0-9.]+) bits/dim ", out, re.MULTILINE)
    assert said, out
    value, error = said.groups()
    options = {"num": 16, "seed": 3, "draws": 2, "spread": "independent"}
    found = diffusion_jax.bits_per_dim(run[0], **options).bits_per_dim
    assert float(value) == pytest.approx(found.value, rel=1e-3)
    assert float(error) == pytest.approx(found.standard_error, rel=1e-2)
    assert "(n=16 against digits validation; continuous; one of 17 values)" in out
    words = ("did you mean 'bpd'", "bpd_options='num' is unknown")
    for door, word in zip(started[1:], words, strict=True):
        code, out, err = door.wait(120)
        assert (code, out, err.count("\n")) == (78, "", 1)
        assert word in err


def test_a_learned_schedule_tells_an_aligned_run_what_is_clean(run):
    """The encoder sees the noise level that its own schedule has at the time, not the first one."""
    config = points()
    config.objective.denoising.alignment.name = "workdir"
    options = {"path": str(run[0]), "time": 0.4, "features_after": 1}
    config.objective.denoising.alignment.workdir.update(options)
    spec = workdir.read_spec(run[0])
    encoder = frozen.prepare(config, spec, make_mesh()).encoder
    trained = workdir.read_config(run[0])
    trained.network.dit.features_after = 1
    built = builders.model(trained, spec)
    level = built.schedule_of(encoder.params).logsnr(0.4)
    assert abs(level - built.schedule.logsnr(0.4)) > 1e-4
    x0 = quick.normal(2, 8, 8, 1)

    def both(params):
        told = built.network.apply(params, x0, jnp.full(2, level), {}, return_features=True)[1]
        return encoder.encode(params, x0), told

    found, expected = quick.run(both, encoder.params)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_no_other_model_shares_the_levels_of_a_learned_schedule(run):
    with pytest.raises(ConfigError, match=r"^weak=.*: two models with learned schedules share no"):
        diffusion_jax.load(run[0], weak=run[0], weak_ema="")


def test_a_learned_schedule_stays_float32_under_bfloat16(run):
    config = digits()
    config.compute_dtype, config.optimizer.precision = "bfloat16", "masters"
    model = builders.model(config, workdir.read_spec(run[0]))
    params = builders.compiled(config, model, make_mesh()).abstract_state.params
    kinds = {leaf.dtype for leaf in jax.tree.leaves(params["schedule"])}
    assert kinds == {jnp.dtype("float32")}
    assert any(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(params))
    t = jax.ShapeDtypeStruct((3,), jnp.float32)
    for name in ("alpha", "sigma", "logsnr"):
        level = jax.eval_shape(lambda p, t, n=name: getattr(model.schedule_of(p), n)(t), params, t)
        assert level.dtype == jnp.float32


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"methd": "flow"}, "option='methd' is unknown .did you mean 'method'"),
        ({"method": "flows"}, "method='flows' is unknown .did you mean 'flow'"),
        ({"split": "test"}, "split='test' is unknown"),
        ({"num": 0}, "num=0: expected at least 1"),
        ({"num": "x"}, "num='x': expected a whole number"),
        ({"seed": -1}, "seed=-1: expected a whole number"),
        ({"draws": 0}, "draws=0: expected a whole number, at least 1"),
        ({"steps": 1.5}, "steps=1.5: expected a whole number"),
        ({"draws": "x"}, "draws='x': expected a whole number"),
        ({"method": "flow", "trace": "exakt"}, "trace='exakt' is unknown .did you mean 'exact'"),
        ({"draws": 2, "method": "discrete"}, "draws=2: not read by the method 'discrete'; leave"),
        ({"trace": "exact"}, "trace='exact': not read by the method 'continuous'; .* 'flow'$"),
        ({"steps": 50}, "steps=50: not read by .* choose 'discrete' or 'flow'$"),
        ({"method": "flow", "spread": "independent"}, "spread='independent': not read"),
        ({"method": "flow", "trace": "exact", "probes": 2}, "probes=2: an exact trace draws none"),
        (
            {"method": "flow", "levels": 0, "draws": 2, "steps": 2, "trace": "exact"},
            "draws=2: 'flow' draws what dequantises",
        ),
        (
            {"method": "flow", "draws": 2},
            "draws=2: the noise of trace='rademacher' .*='exact'$",
        ),
        ({"spread": "batch"}, "spread='batch': the values of a batch depend on each other"),
        (
            {"method": "flow", "solver": "dopri5", "steps": 9},
            "steps=9: not read by solver='dopri5'",
        ),
        ({"method": "flow", "rtol": 1e-3}, "rtol=0.001: not read by solver='rk4'; .*'dopri5'$"),
        ({"method": "flow", "solver": "dopri5", "atol": 0}, "atol=0: expected a number between"),
        ({"first_time": "a"}, "first_time='a': expected a time between 0 and 1"),
        ({"levels": 1}, "levels=1: expected 2 or more"),
        ({"levels": 16}, "levels=16 .given.: some pixels lie between"),
        ({"first_time": 1.0}, "first_time=1.0: expected a time between 0 and 1"),
        ({"examples": np.zeros((3, 8, 8))}, r"examples has shape \(3, 8, 8\); expected \[n, 8, 8"),
        ({"ema": "long"}, "ema='long' is unknown"),
    ],
)
def test_mistakes_of_an_evaluation_are_one_line(run, options, words):
    with pytest.raises(ConfigError, match=words) as raised:
        # The check of annotations that the tests turn on would come first.
        inspect.unwrap(diffusion_jax.bits_per_dim)(run[0], **{"num": 4, **options})
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
        (
            digits,
            {"sampling.grid.name": "karras"},
            "sampling.grid.name='karras'.*expected 'uniform', 'shifted', 'leading', 'linspace', ",
        ),
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
            {"objective.variational.first_time": 0.01},
            "config.objective.variational.first_time=0.01: not read, a learned schedule has",
        ),
        (
            points,
            {"objective.name": "variational", "objective.variational.proposal": "time"},
            "config.objective.variational.proposal='time': not read, num_steps=100 has its own",
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
