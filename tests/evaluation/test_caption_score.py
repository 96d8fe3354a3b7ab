"""The CLIP score against cosines that are known, and against those of transformers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recorded

from diffusion_jax.errors import ConfigError
from diffusion_jax.evaluation import caption_score
from diffusion_jax.evaluation.caption_score import CaptionExtractor, CaptionStream
from diffusion_jax.evaluation.collected import Collected
from diffusion_jax.evaluation.features import clip
from diffusion_jax.evaluation.features.clip_tokens import CaptionTokenizer, CaptionTokens
from diffusion_jax.evaluation.features.extract import Extractor
from diffusion_jax.parallel.mesh import make_mesh


class Numbers(CaptionTokenizer):
    """Captions are numbers: of a row of `rows` each. It counts what it is asked for."""

    def __init__(self, rows):
        self.rows, self.asked = np.asarray(rows, np.int32), []

    def __call__(self, captions):
        self.asked += captions
        cut = np.array([int(text) >= len(self.rows) for text in captions])
        rows = self.rows[[int(text) % len(self.rows) for text in captions]]
        return CaptionTokens(tokens=rows, cut=cut)


def by_angle(params, degrees):
    angle = jnp.deg2rad(degrees[:, 0].astype(jnp.float32))
    return {"normalised": jnp.stack([jnp.cos(angle), jnp.sin(angle)], 1)}


def angles(*degrees):
    """A stream for captions "0", "1", ... which point there, and their tokeniser."""
    tower = clip.TextNetwork(
        params={}, apply=by_angle, length=1, vocabulary=1, logit_scale=None, weights_hash=""
    )
    tokenizer = Numbers([[d] for d in degrees])
    mesh = make_mesh(devices=jax.devices()[:1])
    return CaptionStream(CaptionExtractor(tower, tokenizer, mesh, 4)), tokenizer


def pictures(*degrees):
    return np.asarray(by_angle(None, jnp.asarray(degrees)[:, None])["normalised"])


def test_angles_of_which_the_cosines_are_known():
    stream, tokenizer = angles(10, 100)
    # Apart by 0, 60, 120 and 90 degrees: 1, 1/2, below 0 counted as 0, 0; then by 60 again.
    stream.add(pictures(10, 70, 130), ["0", "0", "0"])
    stream.add(pictures(10, 160), ["1", "1"])
    found = stream.estimate()
    values = [100, 50, 0, 0, 50]
    np.testing.assert_allclose(found.value, np.mean(values), rtol=1e-5)
    np.testing.assert_allclose(found.standard_error, np.std(values, ddof=1) / 5**0.5, rtol=1e-5)
    assert found.n == 5
    # Each caption went through the tower once.
    assert tokenizer.asked == ["0", "1"]
    assert stream.remark == ""


def test_captions_that_were_cut_are_told():
    stream, _ = angles(0, 90)
    stream.add(pictures(0, 0, 0), ["0", "3", "3"])
    assert stream.remark.startswith("1 captions cut")
    assert stream.estimate().n == 3


def test_one_sample_has_no_error_bar_and_none_no_score():
    stream, _ = angles(0)
    with pytest.raises(ConfigError, match="no samples"):
        stream.estimate()
    stream.add(pictures(60), ["0"])
    np.testing.assert_allclose(stream.estimate(), (50.0, np.inf, 1), rtol=1e-5)


def test_cosines_are_those_of_transformers():
    tensors, arrays = recorded.load("clip")
    tower = clip.build_text(tensors, "memory")
    cosines = arrays["logits_per_text"] / tower.logit_scale
    captions = CaptionExtractor(tower, Numbers(arrays["tokens"]), make_mesh())
    images = Extractor(clip.build(tensors, "memory"), make_mesh())
    texts, shown = np.array([2, 0, 3, 1, 0]), np.array([0, 1, 2, 2, 0])
    finite = np.array([True, True, False, True, True])
    collected = Collected(5, captions=CaptionStream(captions))
    collected.add(arrays["images"][shown], images, None, finite, texts.astype(str))
    found = collected.captions.estimate()
    expected = 100 * np.maximum(cosines[texts, shown][finite], 0)
    assert np.ptp(expected) > 1
    np.testing.assert_allclose(found.value, expected.mean(), rtol=1e-4)
    np.testing.assert_allclose(found.standard_error, expected.std(ddof=1) / 2, rtol=1e-4)


@pytest.mark.parametrize("prompts", [None, "", [], ["a", ""], [" "], ["a", 3]])
def test_samples_without_a_caption_are_refused(prompts):
    with pytest.raises(ConfigError, match=r"metrics=clip_score: prompts=.* needs a caption"):
        caption_score.check_prompts(prompts)
    caption_score.check_prompts(["a", "b"])
    caption_score.check_prompts("a")


def test_towers_of_two_networks_do_not_fit():
    stream, _ = angles(0)
    with pytest.raises(ConfigError, match="captions have 2 features and pictures 3; expected both"):
        stream.add(np.ones((1, 3), np.float32), ["0"])
    with pytest.raises(ConfigError, match="needs a caption"):
        stream.add(pictures(0), [])
