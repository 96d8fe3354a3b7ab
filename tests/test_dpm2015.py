"""The parts of the 2015 paper put together from a config: what learns, and what is refused."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import drawn, jit, normal
from toys import shipped

from diffusion_jax import builders, config_rules
from diffusion_jax.data import DataSpec
from diffusion_jax.diffusion import schedules, time_grids
from diffusion_jax.diffusion.denoiser import Denoised
from diffusion_jax.diffusion.processes import LearnedGaussian
from diffusion_jax.errors import ConfigError
from diffusion_jax.evaluation.bound import BoundEvaluator
from diffusion_jax.objectives.base import Context
from diffusion_jax.parallel.mesh import make_mesh

DIGITS = DataSpec(shape=(8, 8, 1), kind="image", num_classes=10)
BITS = DataSpec(shape=(20,), kind="bits", range=(0.0, 1.0))
POINTS = DataSpec(shape=(2,), kind="points", range=(-2.0, 2.0))


@pytest.fixture(scope="module", autouse=True)
def _quick(quick_programs):
    return None


def get_config(name: str, **changes):
    config = shipped(f"dpm2015_{name}", "smoke")
    config.update_from_flattened_dict(changes)
    config_rules.validate(config)
    return config


@pytest.mark.parametrize(("name", "spec"), [("swiss_roll", POINTS), ("digits", DIGITS)])
def test_betas_variances_and_means_all_learn(name, spec):
    """After a step that moves the zero head away, every parameter has a gradient but none of the
    first beta, which is no parameter."""
    config = get_config(name)
    model = builders.model(config, spec)
    objective = builders.objective(config, model)
    params = drawn(model.network.init)
    steps = config.objective.variational.num_steps
    assert params["schedule"]["logits"].shape == (steps - 1,)
    params["head"]["kernel"] = 0.1 * normal(*params["head"]["kernel"].shape, seed=1)
    x = normal(16, *spec.shape, seed=2)
    keys = jax.random.split(jax.random.key(3), 16)
    context = Context(0, {}, {}, {}, jnp.arange(16) / 16, 16)

    @jit
    def run(params):
        return jax.value_and_grad(lambda p: objective(p, {"x": x}, keys, context)[0])(params)

    loss, gradient = run(params)
    assert np.isfinite(loss)
    assert np.abs(gradient["schedule"]["logits"]).min() > 0
    bias = np.asarray(gradient["head"]["bias"]).reshape(2 * spec.shape[-1], -1)
    assert (np.abs(bias) > 0).any(1).all()
    betas = model.schedule_of(params).betas()
    assert float(betas[0]) == pytest.approx(config.process.gaussian.schedule.betas.first)


def test_a_learned_schedule_of_bits_and_its_network_learn():
    config = get_config("heartbeat", **{"process.binomial.keep": "learned"})
    model = builders.model(config, BITS)
    objective = builders.objective(config, model)
    params = drawn(model.network.init)
    steps = config.objective.variational.num_steps
    assert params["schedule"]["logits"].shape == (steps,)
    x = (np.random.default_rng(1).random((16, 20)) < 0.3).astype(np.float32)
    keys = jax.random.split(jax.random.key(3), 16)
    context = Context(0, {}, {}, {}, jnp.arange(16) / 16, 16)
    gradient = jit(jax.grad(lambda p: objective(p, {"x": x}, keys, context)[0]))(params)
    for leaf in jax.tree.leaves((gradient["schedule"], gradient["head"])):
        assert np.abs(leaf).min() > 0


def test_the_evaluator_finds_the_entropy_of_gaussian_data_with_the_true_kernels():
    """Rounded to multiples of a small width, so that the values are discrete."""
    c, width, schedule, dims = 0.5, 0.05, schedules.linear_beta(), 3
    times = time_grids.uniform(8)
    pairs = list(itertools.pairwise(times))
    fractions = [_true_fraction(schedule, c, t, s) for t, s in pairs]
    at, values = np.asarray(times[:-1])[::-1], jnp.asarray(fractions)[::-1]

    def denoiser(params, conditioning):
        def denoise(x, t):
            a, b = schedule.alpha(t), schedule.sigma(t)
            fraction = jnp.full_like(x, jnp.interp(t, at, values))
            return Denoised(a * c**2 * x / (a**2 * c**2 + b**2), variance_fraction=fraction)

        return denoise

    evaluator = BoundEvaluator(
        denoiser=denoiser,
        process_of=lambda params: LearnedGaussian(schedule),
        times=times,
        seed=0,
        mesh=make_mesh(1, 1, 1, 1, devices=jax.devices()[:1]),
        per_dimension=True,
        width=width,
    )
    x = width * np.round(c * normal(4000, dims) / width)
    found = evaluator({}, [{"x": x, "mask": jnp.ones(4000, bool)}])
    entropy = (0.5 * np.log2(2 * np.pi * np.e * c**2) - np.log2(width)) * dims
    assert abs(found["bound_bits"] - entropy) < 3 * found["bound_bits_stderr"] < 0.2
    for name in ("", "_stderr"):
        per_dim = found[f"bound_bits_per_dim{name}"]
        assert per_dim == pytest.approx(found[f"bound_bits{name}"] / dims)
    true = dims * sum(_true_entropy(schedule, c, t, s) for t, s in pairs[:-1]) / np.log(2.0)
    assert found["reverse_entropy_lower_bits"] < true < found["reverse_entropy_upper_bits"]


def _true_variance(schedule, c, t, s):
    a, b, a_s, b_s = schedule.alpha(t), schedule.sigma(t), schedule.alpha(s), schedule.sigma(s)
    own = a_s**2 * c**2 + b_s**2
    return own - (a / a_s * own) ** 2 / (a**2 * c**2 + b**2)


def _true_entropy(schedule, c, t, s):
    return 0.5 * np.log(2 * np.pi * np.e * _true_variance(schedule, c, t, s))


def _true_fraction(schedule, c, t, s):
    variance, b, b_s = _true_variance(schedule, c, t, s), schedule.sigma(t), schedule.sigma(s)
    if b_s == 0:
        return 1.0 + np.log(variance / b**2)
    decay = schedule.alpha(t) * b_s / (schedule.alpha(s) * b)
    return np.log(variance / (b_s**2 * (1 - decay**2))) / np.log(b**2 / b_s**2)


GAUSSIAN, BOUND = "process.gaussian", "objective.variational"


@pytest.mark.parametrize(
    ("name", "spec", "changes", "message"),
    [
        (
            "swiss_roll",
            POINTS,
            {f"{GAUSSIAN}.variance": "learnt"},
            r"config\.process\.gaussian\.variance='learnt' is unknown \(did you mean 'learned'",
        ),
        (
            "swiss_roll",
            POINTS,
            {"objective.name": "denoising", f"{GAUSSIAN}.schedule.name": "cosine"},
            "variance='learned': variances learn from the bound",
        ),
        (
            "swiss_roll",
            POINTS,
            {f"{BOUND}.num_steps": 0, f"{GAUSSIAN}.variance": "small"},
            r"num_steps=0: learned betas are those of the bound's steps",
        ),
        (
            "swiss_roll",
            POINTS,
            {f"{BOUND}.num_steps": 1},
            r"num_steps=1: learned betas .* expected at least 2",
        ),
        (
            "swiss_roll",
            POINTS,
            {f"{GAUSSIAN}.schedule.betas.begin": "even"},
            r"config\.process\.gaussian\.schedule\.betas: begin='even' is unknown",
        ),
        (
            "swiss_roll",
            POINTS,
            {f"{BOUND}.decoder.name": "dequantised"},
            "decoder.name='dequantised': points have no pixels; expected 'density'",
        ),
        (
            "digits",
            DIGITS,
            {f"{BOUND}.decoder.name": "pixels"},
            "decoder.name='pixels': with num_steps=4 the last step decodes",
        ),
        (
            "digits",
            DIGITS,
            {"network.noise_input": "logsnr"},
            r"config\.network\.noise_input='logsnr'",
        ),
        (
            "heartbeat",
            BITS,
            {"process.binomial.keep": "learnt"},
            r"config\.process\.binomial\.keep='learnt' is unknown \(did you mean 'learned'",
        ),
        (
            "heartbeat",
            BITS,
            {"process.binomial.keep": "learned", f"{BOUND}.num_steps": 1},
            "keep='learned': it learns from the bound; expected .* of at least 2",
        ),
        (
            "digits",
            DIGITS,
            {"network.multiscale.scales": 6},
            r"config\.network\.multiscale\.scales=6: 8x8 cannot be halved 5 times; nearest: 4",
        ),
    ],
)
def test_what_cannot_be_ends_in_one_line(name, spec, changes, message):
    config = get_config(name, **changes)
    with pytest.raises(ConfigError, match=message) as error:
        builders.objective(config, builders.model(config, spec))
    assert "\n" not in str(error.value)
