"""Kinds of guidance by name: what a pipeline makes of its branches, and what it refuses.

One step of DDIM from t = 1 (alpha = 0) to 0 returns the guided x0 itself, so that constant
denoisers show what was combined, and with which weights.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.data.spec import DataSpec
from diffusion_jax.diffusion import denoiser, processes, schedules, time_grids
from diffusion_jax.errors import ConfigError
from diffusion_jax.parallel.mesh import make_mesh
from diffusion_jax.pipelines.guiding import Weak
from diffusion_jax.pipelines.options import SamplingOptions
from diffusion_jax.pipelines.pixel import PixelPipeline

pytestmark = pytest.mark.usefixtures("quick_programs")

SCHEDULE = schedules.cosine()
MEANS = np.array([[1.0, -0.5], [-1.0, 0.25], [0.5, 0.75]], np.float32)
NONE, WEAK, PERTURBED = (np.array(v, np.float32) for v in ((0.2, 0.1), (0.4, -0.3), (-0.6, 0.7)))


def constant(shift=0.0):
    """Label y is MEANS[y], none is NONE; all moved by `shift` and the parameter."""

    def bound(params, conditioning):
        def predict(x, t):
            mean = NONE
            if "label" in conditioning:
                mean = jnp.asarray(MEANS)[conditioning["label"]]
            return jnp.broadcast_to(mean + shift + params["move"], x.shape)

        return denoiser.as_denoiser(predict, SCHEDULE)

    return bound


def make(**changes):
    fields = {
        "params": {"move": jnp.float32(0.0)},
        "denoiser": constant(),
        "process": processes.Gaussian(SCHEDULE),
        "schedule": SCHEDULE,
        "spec": DataSpec(shape=(2,), kind="points", num_classes=3, range=(-2.0, 2.0)),
        "conditions": ("label",),
        "times": time_grids.uniform,
        "mesh": make_mesh(devices=jax.devices()[:1]),
        "defaults": SamplingOptions(solver="ddim", steps=1, batch_size=8),
        "weak": Weak(
            params={"move": jnp.float32(0.0)}, denoiser=constant(WEAK), conditions=("label",)
        ),
        "perturbed": constant(PERTURBED),
    }
    return PixelPipeline(**{**fields, **changes})


@pytest.fixture(scope="module")
def pipeline():
    return make()


def assert_means(samples, expected):
    np.testing.assert_allclose(samples.x, np.broadcast_to(expected, samples.x.shape), atol=2e-5)


def test_autoguidance_turns_away_from_the_weak_model(pipeline):
    for w in (1.0, 2.5):
        samples = pipeline.sample(3, guidance=w, guidance_by="autoguidance")
        assert_means(samples, MEANS - (w - 1.0) * WEAK)
    # Its parameters are its own: the weights of the moment change the model alone.
    moved = pipeline.with_params({"move": jnp.float32(5.0)})
    samples = moved.sample(3, guidance=2.5, guidance_by="autoguidance")
    assert_means(samples, MEANS + 5.0 - 1.5 * (WEAK - 5.0))
    without = make(conditions=(), spec=DataSpec(shape=(2,), kind="points", range=(-2.0, 2.0)))
    samples = without.sample(2, guidance=3.0, guidance_by="autoguidance")
    assert_means(samples, NONE - 2.0 * WEAK)


def test_perturbed_attention_goes_beside_the_guidance(pipeline):
    options = {"guidance_by": "perturbed_attention", "guidance_options": {"scale": 1.5}}
    assert_means(pipeline.sample(3, **options), MEANS - 1.5 * PERTURBED)
    both = pipeline.sample(3, guidance=2.0, **options)
    assert_means(both, MEANS + (MEANS - NONE) - 1.5 * PERTURBED)
    # The weight of none is another program than the weight of some.
    assert_means(pipeline.sample(3, **options), MEANS - 1.5 * PERTURBED)


def test_projected_guidance_and_a_start_at_rest(pipeline):
    options = {"parallel": 1.0, "threshold": 0.5}
    samples = pipeline.sample(3, guidance=3.0, guidance_by="apg", guidance_options=options)
    away = MEANS - NONE
    bound = away * np.minimum(1.0, 0.5 / np.linalg.norm(away, axis=1, keepdims=True))
    assert_means(samples, MEANS + 2.0 * bound)
    # Two of three steps rest: x / (alpha + sigma) stays.
    rest = {"guidance_by": "cfg_zero", "guidance_options": {"zero_steps": 2}}
    states = pipeline.sample(3, steps=3, guidance=2.0, trajectory=True, **rest).trajectory
    times = time_grids.uniform(3)
    total = (SCHEDULE.alpha(times) + SCHEDULE.sigma(times))[:, None, None]
    np.testing.assert_allclose(states[1:3] / total[1:3], np.stack([states[0]] * 2), atol=1e-5)
    assert np.abs(states[3] - states[2]).max() > 0.1


def test_negative_and_further_conditions(pipeline):
    samples = pipeline.sample(3, labels=[0], guidance=3.0, negative_labels=[1, 2])
    assert_means(samples, MEANS[0] + 2.0 * (MEANS[0] - MEANS[[1, 2, 1]]))
    samples = pipeline.sample(3, guidance=1.5, also_labels=[2, 1], also_guidance=[2.0, -0.5])
    expected = NONE + 1.5 * (MEANS - NONE) + 2.0 * (MEANS[2] - NONE) - 0.5 * (MEANS[1] - NONE)
    assert_means(samples, expected)
    arrays = {"also_labels": jnp.array([2, 1]), "also_guidance": jnp.array([2.0, -0.5])}
    assert_means(pipeline.sample(3, guidance=1.5, **arrays), expected)
    # The guidance weighs those that have no weight of their own, also where it is 1.
    samples = pipeline.sample(3, also_labels=[2])
    assert_means(samples, MEANS + (MEANS[2] - NONE))
    both = pipeline.sample(2, labels=[0], also_labels=[2], also_guidance=[0.5], negative_labels=[1])
    assert_means(both, MEANS[0] + 0.5 * (MEANS[2] - MEANS[1]))
    alone = {"labels": np.array(0), "also_labels": jnp.array(2), "also_guidance": np.array(0.5)}
    found = pipeline.sample(2, negative_labels=[1], **alone)
    assert_means(found, MEANS[0] + 0.5 * (MEANS[2] - MEANS[1]))
    # A model that never saw no label has a negative one all the same.
    strict = make(always=("label",))
    samples = strict.sample(2, labels=[0], guidance=2.0, negative_labels=[1])
    assert_means(samples, 2.0 * MEANS[0] - MEANS[1])


def test_log_probability_shifts_by_its_gradient():
    """Of a linear one the gradient g is constant: one step from t < 1 shifts x0 by
    sigma^2 / alpha g, and the state at 0 is x0."""
    start, g = 0.6, np.array([0.3, -0.7], np.float32)
    pipeline = make(times=lambda steps: time_grids.uniform(steps, start))
    shift = float(SCHEDULE.sigma(start) ** 2 / SCHEDULE.alpha(start))

    def log_probability(x, t):
        return x @ g

    options = {"log_probability": log_probability, "log_probability_scale": 2.0}
    assert_means(pipeline.sample(3, **options), MEANS + 2.0 * shift * g)
    guided = pipeline.sample(3, guidance=2.0, **options)
    assert_means(guided, 2.0 * MEANS - NONE + 2.0 * shift * g)
    limited = pipeline.sample(3, guidance_interval=(0.0, 0.5), **options)
    assert_means(limited, MEANS)
    # Each guidance has the deviation of what it guides: here that of the conditional x0.
    moved = MEANS + 2.0 * shift * g
    spread = MEANS.std(1, keepdims=True)
    rescaled = pipeline.sample(3, guidance_rescale=1.0, **options)
    assert_means(rescaled, moved * spread / moved.std(1, keepdims=True))
    with pytest.raises(ConfigError, match=r"log_probability leaves x0 open at times\[0\]=1"):
        make().sample(2, **options)


def test_functions_that_look_alike_are_told_apart():
    """The text of a large array leaves out its middle."""
    pipeline = make(times=lambda steps: time_grids.uniform(steps, 0.6))
    shift = float(SCHEDULE.sigma(0.6) ** 2 / SCHEDULE.alpha(0.6))

    def along(weights, x, t):
        return x.sum(-1) * weights[2000]

    for g in (0.3, -0.7):
        weights = np.zeros(4000, np.float32)
        weights[2000] = g
        guide = functools.partial(along, weights)
        assert_means(pipeline.sample(3, log_probability=guide), MEANS + shift * g)


BY = "guidance_by"


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({}, {BY: "agp"}, "guidance_by='agp' is unknown (did you mean 'apg'?)"),
        ({}, {BY: 3}, "guidance_by=3: expected a name"),
        ({}, {BY: "apg", "guidance_options": {"momentun": 0.1}}, "did you mean 'momentum'"),
        ({}, {BY: "apg", "guidance_options": {"parallel": "x"}}, "apg.parallel='x': expected a"),
        ({}, {"guidance_options": {"scale": 1.0}}, "classifier_free option 'scale' is unknown"),
        (
            {},
            {BY: "apg", "guidance": 2.0, "guidance_options": {"momentum": 1.0}},
            "apg.momentum=1.0 must lie between -1 and 1",
        ),
        (
            {},
            {BY: "cfg_zero", "guidance": 2.0, "guidance_options": {"zero_steps": 1}},
            "cfg_zero.zero_steps=1: expected 0 <= zero_steps < 1",
        ),
        ({"weak": None}, {BY: "autoguidance", "guidance": 2.0}, "no weaker model is given"),
        ({}, {BY: "apg"}, "guidance_by='apg' has no effect with guidance=1.0; give a guidance"),
        ({}, {BY: "cfg_zero", "guidance_interval": (0.0, 0.5)}, "'cfg_zero' has no effect"),
        ({}, {BY: "autoguidance"}, "guidance_by='autoguidance' has no effect with guidance=1.0"),
        ({"perturbed": None}, {BY: "perturbed_attention"}, "has no self-attention"),
        ({"conditions": ()}, {BY: "apg", "guidance": 2.0}, "guidance=2.0: the model is uncond"),
        ({"always": ("label",)}, {BY: "cfg_zero", "guidance": 2.0}, "has no prediction without"),
        ({"schedule": None}, {BY: "apg", "guidance": 2.0}, "no schedule of noise; expected"),
        ({}, {"negative_labels": [1]}, "a negative condition has no effect"),
        ({}, {"negative_labels": [7], "guidance": 2.0}, "negative_labels=7: out of range"),
        ({}, {"negative_prompts": "a", "guidance": 2.0}, "negative_prompts='a': the model is not"),
        (
            {},
            {BY: "autoguidance", "negative_labels": [1], "guidance": 2.0},
            "guidance_by='autoguidance' has no branch for a negative",
        ),
        ({}, {"also_guidance": [2.0]}, "also_guidance=[2.0]: expected one for each of no further"),
        ({}, {"also_labels": [1, 2], "also_guidance": [2.0]}, "each of 2 further conditions"),
        ({}, {"also_labels": [3]}, "also_labels=3: out of range"),
        ({}, {BY: "apg", "guidance": 2.0, "also_labels": [1]}, "guidance_by='apg': leave further"),
        ({"always": ("label",)}, {"also_labels": [1]}, "also_...: the model was trained with"),
        ({}, {"log_probability": 3}, "log_probability=3: expected a function"),
    ],
)
def test_bad_guidance(changes, options, words):
    with pytest.raises(ConfigError, match=re.escape(words)) as raised:
        inspect.unwrap(PixelPipeline.sample)(make(**changes), 2, **options)
    assert "\n" not in str(raised.value)


def test_a_kind_of_the_defaults_waits_for_a_guidance():
    """And so does one of a call that says itself that there is to be none."""
    defaults = SamplingOptions(solver="ddim", steps=1, batch_size=8, guidance_by="apg")
    assert_means(make(defaults=defaults).sample(3), MEANS)
    assert_means(make().sample(3, guidance_by="apg", guidance=1.0), MEANS)
    guided = make(defaults=dataclasses.replace(defaults, guidance=2.0, guidance_by="autoguidance"))
    expected = make().sample(3, guidance=2.0, guidance_by="apg")
    assert_means(guided.sample(3, guidance_by="apg"), expected.x)


def test_tokens_take_what_is_made_of_probabilities():
    spec = DataSpec(shape=(4,), kind="tokens", num_classes=3, vocabulary=5)
    pipeline = dataclasses.replace(make(), spec=spec, schedule=None)
    defaults = dataclasses.replace(pipeline.defaults, solver="ancestral")
    pipeline = dataclasses.replace(pipeline, defaults=defaults)
    pipeline.options(guidance=2.0, guidance_by="autoguidance")
    with pytest.raises(ConfigError, match="not for tokens; expected 'classifier_free' or 'auto"):
        pipeline.options(guidance_by="perturbed_attention")
