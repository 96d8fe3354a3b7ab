"""Examples given to `bits_per_dim`: arrays of any kind with conditions, and what is refused."""

from __future__ import annotations

import dataclasses
import inspect
import re

import jax.numpy as jnp
import numpy as np
import pytest
from toys import one_device

import diffusion_jax
from diffusion_jax import builders, examples
from diffusion_jax import config as configs
from diffusion_jax.data import DataSpec
from diffusion_jax.data.arrays import ArraySource
from diffusion_jax.diffusion.broadcasting import expand
from diffusion_jax.diffusion.denoiser import Denoised, Denoiser
from diffusion_jax.errors import ConfigError


@pytest.fixture(scope="module", autouse=True)
def _quick(quick_programs):
    with one_device():
        yield


@pytest.fixture(scope="module")
def pipeline():
    """Of digits, with a denoiser that says the mean of its class in place of a network."""
    config = configs.base()
    config.data.name, config.network.name = "digits", "dit"
    config.network.dit.update({"patch": 4, "dim": 16, "depth": 1, "heads": 2})
    model = builders.model(config, builders.source(config, "train").spec)
    made = builders.pipeline(config, model, {}, builders.mesh(config))

    def denoiser(params, conditioning):
        def step(x, t, carry):
            mean = expand(0.1 * conditioning["label"] - 0.9, x)
            return Denoised(jnp.broadcast_to(mean, x.shape)), carry

        return Denoiser(step)

    return dataclasses.replace(made, denoiser=denoiser)


@pytest.fixture(scope="module")
def batch():
    config = configs.base()
    config.data.name = "digits"
    return builders.source(config, "validation").fetch(np.arange(12))


def bits(*arguments, **options):
    # The check of annotations that the tests turn on would come first.
    return inspect.unwrap(diffusion_jax.bits_per_dim)(*arguments, **options)


def test_arrays_of_any_kind_cost_what_their_source_does(pipeline, batch):
    config = configs.base()
    config.data.name = "digits"
    source = builders.source(config, "validation")
    expected = diffusion_jax.bits_per_dim(pipeline, source, num=12).bits_per_dim
    x, label = batch["x"], batch["conditioning"]["label"]
    for values, labels in ((x, label), (x.tolist(), label.tolist()), (jnp.asarray(x), label)):
        given = {"label": labels}
        found = diffusion_jax.bits_per_dim(pipeline, values, conditioning=given).bits_per_dim
        assert found == expected
    others = {"label": (label + 1) % 10}
    found = diffusion_jax.bits_per_dim(pipeline, x, conditioning=others).bits_per_dim
    assert abs(found.value - expected.value) > 1e-3


@pytest.mark.parametrize(
    ("examples", "conditioning", "words"),
    [
        (None, None, "examples=None: a loaded model does not know its data"),
        ("x", None, "examples is an array and the model reads label: give conditioning={'label':"),
        ("x", {}, "examples is an array and the model reads label"),
        ("x", 3, "conditioning is a int; expected a mapping"),
        ("x", {"lable": []}, "conditioning of 'lable': the model reads label; leave it"),
        ("x", {"label": [1]}, "conditioning['label'] has 1 values; expected 12, one for each"),
        ("x", {"label": [11] * 12}, "conditioning['label']=11: out of range; expected 0..9"),
        ("x", {"label": np.full(12, 0.5)}, "conditioning['label']=array([0.5"),
        ("source", {"label": [1] * 12}, "conditioning: examples of a source have their own"),
        ("source", None, "examples have no label, which the model reads"),
        ("other source", None, "examples have num_classes=0; the model reads label"),
        ("no source", None, "examples is a source of none; expected at least one"),
        (np.zeros((0, 8, 8, 1)), None, "examples has shape (0, 8, 8, 1): expected at least one"),
        ([], None, "examples has shape (0,); expected [n, 8, 8, 1]"),
        (3.0, None, "examples has shape (); expected [n, 8, 8, 1]"),
        ("digits", None, "examples is a str; expected a source, or an array [n, 8, 8, 1] of num"),
        ([[1.0], [1.0, 2.0]], None, "examples is a list; expected a source"),
        (
            np.full((2, 8, 8, 1), 255, np.uint8),
            None,
            "examples has uint8 values from 255 to 255; expected pixels from -1 to 1; those of 0 "
            "to 255 are x / 127.5 - 1",
        ),
        (np.ones((2, 8, 8, 1), np.uint8), None, "examples has uint8 values from 1 to 1; expected"),
        (np.full((2, 8, 8, 1), 1.5), None, "examples has float64 values from 1.5 to 1.5; expected"),
    ],
)
def test_mistakes_are_one_line(pipeline, batch, examples, conditioning, words):
    x, ids = batch["x"], batch["id"]
    spec = pipeline.spec
    named = {
        "x": x,
        "source": ArraySource(spec=spec, x=x, example_ids=ids),
        "other source": ArraySource(
            spec=dataclasses.replace(spec, num_classes=0), x=x, example_ids=ids
        ),
        "no source": ArraySource(spec=spec, x=x[:0], example_ids=ids[:0]),
    }
    chosen = named.get(examples, examples) if isinstance(examples, str) else examples
    with pytest.raises(ConfigError, match=f"^{re.escape(words)}") as raised:
        bits(pipeline, chosen, conditioning=conditioning)
    assert "\n" not in str(raised.value)


BITS = DataSpec(shape=(2,), kind="bits", range=(0.0, 1.0))
TOKENS = DataSpec(shape=(2,), kind="tokens", vocabulary=5)
POINTS = DataSpec(shape=(2,), kind="points")


def test_values_become_those_of_training():
    for spec, given, kind in (
        (BITS, np.array([[True, False]]), np.float32),
        (BITS, np.array([[1, 0]], np.uint8), np.float32),
        (TOKENS, np.array([[4, 0]], np.uint8), np.int32),
        (POINTS, jnp.array([[9.0, 0.5]], jnp.bfloat16), np.float32),
    ):
        found = examples.values_of(given, spec)
        assert found.dtype == kind
        np.testing.assert_array_equal(found, np.asarray(given, np.float32))


@pytest.mark.parametrize(
    ("spec", "given", "words"),
    [
        (BITS, [[0.5, 1.0]], "values from 0.5 to 1; expected bits, 0 or 1"),
        (TOKENS, [[5, 0]], "values from 0 to 5; expected tokens, whole numbers from 0 to 4"),
        (TOKENS, [[-1, 0]], "values from -1 to 0; expected tokens"),
        (TOKENS, [[1.0, 0.0]], "float64 values from 0 to 1; expected tokens, whole numbers"),
    ],
)
def test_values_out_of_their_range(spec, given, words):
    with pytest.raises(ConfigError, match=words):
        examples.values_of(given, spec)


def test_captions_and_numbers_beside_an_array(pipeline):
    spec = DataSpec(shape=(2,), kind="points", text_length=4, scalars=("p", "q"))
    other = dataclasses.replace(pipeline, spec=spec, conditions=("text", "scalar"))
    given = {"text": ["b", ""], "scalar": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
    found = examples.conditioning_of(given, other, 2)
    np.testing.assert_array_equal(found["text"], [[99, 0, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(found["scalar"], given["scalar"])
    with pytest.raises(
        ConfigError, match=r"^conditioning\['scalar'\]=.*: expected rows of 2: p, q$"
    ):
        examples.conditioning_of({**given, "scalar": np.zeros((2, 3))}, other, 2)
    with pytest.raises(ConfigError, match=r"^conditioning of 'text': the model is unconditional"):
        examples.conditioning_of(given, dataclasses.replace(other, conditions=()), 2)
