"""Prompts and numbers as conditions of samples, with an exact denoiser in place of a network."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.data.spec import DataSpec
from diffusion_jax.diffusion import denoiser, processes, schedules, time_grids
from diffusion_jax.errors import ConfigError
from diffusion_jax.parallel.mesh import make_mesh
from diffusion_jax.pipelines.options import SamplingOptions, text_list
from diffusion_jax.pipelines.pixel import PixelPipeline
from diffusion_jax.pipelines.previews import Previews

pytestmark = pytest.mark.usefixtures("quick_programs")

SCHEDULE, LENGTH = schedules.cosine(), 6


def exact(params, conditioning):
    """The first byte of a caption is the mean of both coordinates, 0 without; numbers are added."""

    def predict(x, t):
        mean = jnp.zeros((x.shape[0], 1))
        if "text" in conditioning:
            assert conditioning["text"].shape == (x.shape[0], LENGTH)
            # Token 98 is the byte "a"; no text counts as the null.
            first = conditioning["text"][:, :1]
            mean = mean + jnp.where(first > 0, 0.01 * (first - 98.0), 0.0)
        if "scalar" in conditioning:
            mean = mean + conditioning["scalar"]
        return jnp.broadcast_to(mean, x.shape)

    return denoiser.as_denoiser(predict, SCHEDULE)


def make(**changes):
    fields = {
        "params": {},
        "denoiser": exact,
        "process": processes.Gaussian(SCHEDULE),
        "schedule": SCHEDULE,
        "spec": DataSpec(
            shape=(2,), kind="points", range=(-2.0, 2.0), text_length=LENGTH, scalars=("p", "q")
        ),
        "conditions": ("text", "scalar"),
        "times": time_grids.uniform,
        "mesh": make_mesh(devices=jax.devices()[:1]),
        "defaults": SamplingOptions(solver="ddim", steps=2, batch_size=64),
    }
    return PixelPipeline(**{**fields, **changes})


def means(samples) -> list[float]:
    return np.round(100 * samples.x.mean(axis=1)).astype(int).tolist()


def test_prompts_are_cycled_and_returned():
    samples = make().sample(5, prompts=["b", "k"])
    assert means(samples) == [1, 10, 1, 10, 1]
    assert samples.text.tolist() == ["b", "k", "b", "k", "b"]
    assert samples.label is None
    assert make().sample(2, prompts="d").text.tolist() == ["d", "d"]
    assert means(make().sample(1, prompts=["k", "b"])) == [10]


def test_the_batch_size_changes_no_sample():
    prompts = ["b", "q", "", "zebra"]
    whole = make().sample(9, prompts=prompts, seed=3, solver="ddpm")
    for size in (1, 4):
        parts = make().sample(9, prompts=prompts, seed=3, solver="ddpm", batch_size=size)
        np.testing.assert_allclose(parts.x, whole.x, atol=1e-5)
        assert parts.text.tolist() == whole.text.tolist()


@pytest.mark.parametrize("prompts", [None, "", [""], []])
def test_no_prompt_is_the_null(prompts):
    samples = make().sample(3, prompts=prompts)
    assert means(samples) == [0, 0, 0]
    assert samples.text.tolist() == [""] * 3


def test_a_prompt_that_is_too_long_is_cut_with_a_word(caplog):
    """At a character: "é" has two bytes."""
    samples = make().sample(2, prompts=["abcdefgh", "abcdeé"])
    assert samples.text.tolist() == ["abcdef", "abcde"]
    (record,) = caplog.records
    assert "2 prompts" in record.getMessage()
    assert "6 bytes" in record.getMessage()
    assert "abcdefgh" in record.getMessage()
    caplog.clear()
    make().sample(2, prompts=["abcdef"])
    assert not caplog.records


def test_guidance_goes_from_the_null_past_the_prompt():
    for guidance in (0.0, 1.0, 3.0):
        samples = make().sample(2, prompts=["k", "b"], guidance=guidance)
        assert means(samples) == [round(guidance * 10), round(guidance)]


def test_numbers_condition_the_samples():
    rows = [[0.1, 0.3], [0.5, -0.5]]
    samples = make().sample(3, scalars=rows, prompts="a")
    np.testing.assert_allclose(samples.x, [rows[0], rows[1], rows[0]], atol=1e-5)
    np.testing.assert_allclose(samples.arrays()["scalar"], [rows[0], rows[1], rows[0]])
    one = make().sample(2, scalars=np.array([0.2, 0.4]))
    np.testing.assert_allclose(one.x, [[0.2, 0.4]] * 2, atol=1e-5)
    with_nothing = make().sample(2)
    np.testing.assert_allclose(with_nothing.x, 0.0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scalars": [[1.0]]}, ["scalars=[[1.0]]", "rows of 2: p, q"]),
        ({"scalars": [[1.0, float("nan")]]}, ["scalars=", "rows of 2"]),
        ({"scalars": np.zeros((0, 2))}, ["scalars=", "rows of 2"]),
        ({"labels": [1]}, ["labels=[1]", "not conditioned by label"]),
    ],
)
def test_mistakes(options, words):
    with pytest.raises(ConfigError) as error:
        make().sample(2, **options)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("always", "given", "missing"),
    [("text", {}, "prompts"), ("scalar", {"prompts": "a"}, "scalars")],
)
def test_what_training_always_gave_is_needed(always, given, missing):
    """The null was never trained: samples without would be of no model at all."""
    pipeline = make(always=(always,))
    with pytest.raises(
        ConfigError, match=f"{missing}=None: .* {always}_dropout=0 .* give {missing}"
    ):
        pipeline.sample(2, **given)
    pipeline.trace()
    pipeline.sample(2, prompts="a", scalars=[[0.1, 0.2]])


@pytest.mark.parametrize("prompts", [3, ["a", 3], [None]])
def test_what_is_no_text(prompts):
    with pytest.raises(ConfigError, match=r"prompts=(3|None): expected a text"):
        text_list(prompts, LENGTH)


def test_a_model_without_captions_takes_none():
    for options in ({"prompts": "a"}, {"scalars": [[1.0, 2.0]]}):
        with pytest.raises(ConfigError, match="the model is unconditional"):
            make(conditions=()).sample(2, **options)
    assert make(conditions=()).sample(2, prompts=[]).text is None


def test_previews_show_the_captions_they_are_given(tmp_path):
    seen = []
    previews = Previews(
        num=4,
        seed=0,
        folder=tmp_path,
        trajectory=tmp_path / "t.gif",
        last_step=9,
        prompts=["b", "k"],
        write=True,
        show=lambda step, name, image: seen.append((step, name)),
    )
    drawn = []
    pipeline = make()
    inner = PixelPipeline.sample

    def sample(self, *args, **options):
        drawn.append(inner(self, *args, **options))
        return drawn[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PixelPipeline, "sample", sample)
        previews(pipeline, 3)
    assert means(drawn[0]) == [1, 10, 1, 10]
    assert seen == [(3, "samples")]
    assert (tmp_path / "00000003.png").exists()


def test_a_prompt_that_is_not_utf_8():
    # What Python makes of a byte from the command line that is none.
    with pytest.raises(ConfigError, match="not UTF-8"):
        text_list(["caf\udce9"], 10)
