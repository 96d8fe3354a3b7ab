"""What scores are called, and what is said of them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from diffusion_jax.errors import ConfigError
from diffusion_jax.evaluation import kernel_distance, metrics
from diffusion_jax.evaluation.collected import Collected
from diffusion_jax.evaluation.features.protocol import FeatureNetwork
from diffusion_jax.evaluation.metrics import Reference

CLIP = FeatureNetwork(
    name=metrics.CMMD_NETWORK,
    score="FD-CLIP",
    params={},
    apply=lambda params, pixels: {},
    resize="none",
    weights_hash="0",
)


def drawn(seed, shift, count=60):
    """Embeddings of length 1, and the same of other lengths: [n, 8] each."""
    random = np.random.default_rng(seed)
    features = random.normal(size=(count, 8)) + shift
    lengths = random.uniform(0.1, 9.0, (count, 1))
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    return unit, unit * lengths


def collected(features):
    part = Collected(len(features))
    part.add(np.zeros((len(features), 2, 2, 1), np.uint8), lambda _: {"features": features})
    return part


def against(features):
    return Reference(name="r", hash="0", count=len(features), moments={}, features=features)


def test_cmmd_is_of_embeddings_of_length_1():
    (unit, features), (other, reference) = drawn(0, 0.5), drawn(1, 0.0)

    def score(features, reference):
        (found,) = metrics.scores(["cmmd"], collected(features), against(reference), CLIP)
        assert found.name == "CMMD-CLIP"
        return found.estimate

    np.testing.assert_allclose(score(features, reference), score(unit, other), rtol=1e-9)
    raw = kernel_distance.kernel_distance(kernel_distance.gaussian, features, reference)
    assert 1000 * raw.value > 5 * score(unit, other).value > 0


@pytest.mark.parametrize(
    ("name", "score", "remark"),
    [
        (metrics.CMMD_NETWORK, "FD-CLIP", ""),
        ("clip_vit_b32", "FD-CLIP", "published values are of clip_vit_l14_336"),
        ("dinov2_vits14", "FD-DINOv2", "not of CLIP, whose embeddings CMMD is defined by"),
    ],
)
def test_cmmd_says_where_it_is_not_the_published_one(name, score, remark):
    unit, _ = drawn(0, 0.5)
    network = dataclasses.replace(CLIP, name=name, score=score)
    found = metrics.scores(["cmmd", "kid"], collected(unit), against(unit), network)
    assert [one.remark for one in found] == [remark, ""]


def test_names_of_scores():
    assert metrics.full_name("FD-infinity", "FID") == "FID-infinity"
    assert metrics.full_name("KID", "FID") == "KID"
    assert metrics.full_name("KID", "FD-Inception") == "KID-Inception"
    assert metrics.full_name("CLIP-score", "FD-CLIP") == "CLIP-score"


def test_no_score_of_captions_that_were_not_collected():
    unit, _ = drawn(0, 0.5)
    with pytest.raises(ConfigError, match="clip_score: nothing was compared with captions"):
        metrics.scores(["clip_score"], collected(unit), against(unit), CLIP)
