"""What scores are called, and what is said of them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from diffusion_jax.errors import ConfigError
from diffusion_jax.evaluation import kernel_distance, metrics
from diffusion_jax.evaluation.caption_score import METRIC as CAPTION_SCORE
from diffusion_jax.evaluation.collected import Collected, NothingFinite
from diffusion_jax.evaluation.features.protocol import FeatureNetwork
from diffusion_jax.evaluation.metrics import Reference
from diffusion_jax.evaluation.moments import Moments

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
        (metrics.CMMD_NETWORK, "FD-CLIP", "unbiased; pictures resized with antialias"),
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


OWN = dataclasses.replace(CLIP, name="self", score="FD-self")
CLASSIFIER = dataclasses.replace(CLIP, name="inception_v3", score="FID")


def test_accuracy_is_of_the_classes_that_the_network_learned():
    given = {"features": 8, "logits": 1008}
    metrics.check(["inception_score"], CLASSIFIER, given, 1000)
    metrics.check(["inception_score", "class_accuracy"], OWN, given, 1000)
    words = (
        "class_accuracy: features=inception_v3 has other classes than the data; expected "
        "features=self"
    )
    with pytest.raises(ConfigError) as early:
        metrics.check(["class_accuracy"], CLASSIFIER, given, 1000)
    logits = np.random.default_rng(0).normal(size=(60, 1008))
    part = Collected(60)
    found = {"features": drawn(0, 0.5)[0], "logits": logits}
    part.add(np.zeros((60, 2, 2, 1), np.uint8), lambda _: found, np.arange(60) % 10)
    reference = against(drawn(1, 0.0)[0])
    with pytest.raises(ConfigError) as late:
        metrics.scores(["class_accuracy"], part, reference, CLASSIFIER)
    assert str(early.value) == str(late.value) == words
    # Of the network itself, and of any classes, there are scores.
    assert metrics.scores(["class_accuracy"], part, reference, OWN)[0].name == "class-accuracy-self"
    assert metrics.scores(["inception_score"], part, reference, CLASSIFIER)[0].name == "IS"


@pytest.mark.parametrize("name", metrics.METRICS)
def test_samples_of_which_none_is_a_number(name):
    part = Collected(60, ("features", "spatial"))
    part.add(np.zeros((60, 2, 2, 1), np.uint8), lambda _: {}, finite=np.zeros(60, bool))
    features = drawn(0, 0.5)[0]
    moments = dict.fromkeys(("features", "spatial"), Moments.of(features))
    reference = Reference(name="r", hash="0", count=60, moments=moments, features=features)
    with pytest.raises(NothingFinite, match="none of 60 samples is finite: expected numbers"):
        metrics.scores([name], part, reference, OWN)


FEWEST = {
    **dict.fromkeys(("fd", "fd_infinity", "sfid"), 2),
    **{"kid": 10, "cmmd": 10, "precision_recall": 4, "density_coverage": 6},
    **dict.fromkeys(("inception_score", "class_accuracy", CAPTION_SCORE), 1),
}


@pytest.mark.parametrize("name", metrics.METRICS)
def test_references_that_are_too_small(name):
    """What is refused beforehand is what would fail in the end, and no more."""
    given = {"features": 3, "spatial": 3, "logits": 4}
    random = np.random.default_rng(0)
    names = ("features", "spatial")

    def reference(count):
        moments = dict.fromkeys(names, Moments.of(random.normal(size=(count, 3))))
        features = random.normal(size=(count, 3))
        return Reference(name="folder x", hash="0", count=count, moments=moments, features=features)

    def scores(reference):
        part = Collected(60, names)
        found = {key: random.normal(size=(60, size)) for key, size in given.items()}
        part.add(np.zeros((60, 2, 2, 1), np.uint8), lambda _: found, np.zeros(60))
        return metrics.scores([name], part, reference, OWN)

    needed = FEWEST[name]
    metrics.check([name], OWN, given, 60, reference(needed))
    if name != CAPTION_SCORE:
        scores(reference(needed))
    if needed == 1:
        return
    small = reference(needed - 1)
    words = f"reference: folder x has {needed - 1} examples; {name} needs at least {needed}"
    with pytest.raises(ConfigError, match=words):
        metrics.check([name], OWN, given, 60, small)
    with pytest.raises(ConfigError):
        scores(small)


def test_published_statistics_of_an_unknown_number_of_examples():
    moments = {"features": Moments.given(np.zeros(3), np.eye(3), 2)}
    reference = Reference(name="r.npz", hash="0", count=None, moments=moments, features=None)
    metrics.check(["fd", "fd_infinity"], OWN, {"features": 3}, 60, reference)
    with pytest.raises(ConfigError, match=r"kid: r\.npz holds statistics alone"):
        metrics.check(["kid"], OWN, {"features": 3}, 60, reference)


@pytest.mark.parametrize("dimensions", [3, 40])
def test_distances_of_fewer_samples_than_dimensions_say_so(dimensions):
    random = np.random.default_rng(0)
    moments = {"features": Moments.of(random.normal(size=(200, dimensions)))}
    reference = Reference(name="r", hash="0", count=200, moments=moments, features=None)
    part = collected(random.normal(size=(40, dimensions)))
    fd, infinity = metrics.scores(["fd", "fd_infinity"], part, reference, OWN)
    assert fd.remark.startswith("few samples (below 10000)")
    assert ("fewer than the 40 dimensions" in fd.remark) == (dimensions == 40)
    assert infinity.remark == fd.remark
