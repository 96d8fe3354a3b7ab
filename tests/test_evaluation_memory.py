"""Memory of an evaluation: not more for eight times as many samples or training examples."""

from __future__ import annotations

import dataclasses
import gc
import tracemalloc

import jax
import numpy as np
import pytest

from diffusion_jax import feature_networks
from diffusion_jax.data.part import Part, drawn
from diffusion_jax.data.spec import DataSpec
from diffusion_jax.evaluation import collected, moments, references
from diffusion_jax.evaluation.features.extract import Extractor
from diffusion_jax.evaluation.features.protocol import FeatureNetwork
from diffusion_jax.parallel.mesh import make_mesh

SHAPE = (16, 16, 1)
FEW, MANY = 1_000, 8_000


@dataclasses.dataclass(frozen=True)
class Sorted:
    """Pictures made when they are asked for, by class: the first half dark, the second light."""

    count: int
    spec = DataSpec(shape=SHAPE, kind="image", num_classes=2)

    def __len__(self):
        return self.count

    def ids(self, indices):
        return indices

    def fetch(self, indices, positions=None):
        label = (indices >= self.count // 2).astype(np.int32)
        x = np.random.default_rng(int(indices[0])).normal(size=(len(indices), *SHAPE))
        x = (np.clip(0.1 * x, -0.4, 0.4) + label[:, None, None, None] - 0.5).astype(np.float32)
        return {"x": x, "conditioning": {"label": label}, "id": indices}


@pytest.fixture(scope="module")
def extractor():
    def apply(params, x):
        features = x[..., 0].reshape(len(x), -1).astype("float32")
        return {"features": features, "logits": 0.1 * features[:, :3]}

    network = FeatureNetwork(
        name="means",
        score="FD-means",
        params={},
        apply=apply,
        resize="none",
        weights_hash="0" * 16,
    )
    return Extractor(network, make_mesh(devices=jax.devices()[:1]), 256)


def peak(function):
    """Bytes at most, beyond what is there."""
    gc.collect()
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def assert_level(of):
    """Of the pixels of eight times as many examples, a quarter would break this."""
    of(FEW)  # what is imported or compiled at first
    few, many = peak(lambda: of(FEW)), peak(lambda: of(MANY))
    # A few numbers an example are allowed; none of its pixels.
    assert many - few < 0.25 * (MANY - FEW) * np.prod(SHAPE), (few, many)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """All parts of the moments are there from few examples on."""
    monkeypatch.setattr(moments, "BLOCK", 64)


def test_samples(extractor, monkeypatch):
    monkeypatch.setattr(collected, "KEPT", 500)
    kept = []

    def collect(count):
        part = collected.Collected(count)
        for pixels, labels in references.pictures(Sorted(count)):
            part.add(pixels, extractor, labels)
        assert part.count == count
        assert len(part.features()) == len(part.in_order()[0]) == 500
        kept.append(part)

    assert_level(lambda count: (collect(count), kept.clear()))
    # Drawn from all of them: half are of the second class.
    collect(FEW)
    assert 0.4 < (kept[0].in_order()[0] >= FEW // 2).mean() < 0.6


def test_references(extractor, monkeypatch, tmp_path):
    monkeypatch.setattr(collected, "KEPT", 500)
    names = iter(range(9))

    def reference(count):
        folder = tmp_path / str(next(names))
        found = references.of_source(Sorted(count), "sorted", extractor, ("features",), folder)
        assert found.count == count

    assert_level(reference)


def test_what_the_network_of_the_data_learns_from(monkeypatch, tmp_path):
    monkeypatch.setattr(feature_networks, "LEARN_FROM", 500)
    seen, names = [], iter(range(9))

    def train(pixels, labels, classes, **options):
        seen.append(
            (pixels.shape, np.bincount(labels, minlength=classes), pixels[labels == 1].min())
        )
        return dataclasses.make_dataclass("Trained", ["params"])({})

    monkeypatch.setattr(feature_networks.self_trained, "train", train)

    def learn(count):
        part = drawn(Sorted(count), feature_networks.LEARN_FROM)
        feature_networks._known_or_learned(part, tmp_path / str(next(names)), len)

    assert_level(learn)
    assert len(seen) == 3
    for shape, classes, lightest in seen:
        assert shape == (500, 16, 16, 3)
        assert classes.min() > 200  # of a source that is sorted
        assert lightest > 127  # each picture with its own label


def test_some_examples_of_a_source():
    source = Sorted(1000)
    part = drawn(source, 100)
    assert isinstance(part, Part)
    assert len(part) == len(np.unique(part.chosen)) == 100
    np.testing.assert_array_equal(part.ids(np.array([0, 7])), part.chosen[[0, 7]])
    assert (np.diff(part.chosen) > 0).all()
    assert drawn(source, 100).chosen.tolist() == part.chosen.tolist()
    assert drawn(source, 100, seed=1).chosen.tolist() != part.chosen.tolist()
    assert drawn(source, 1000) is source
    rows = np.array([3, 4])
    np.testing.assert_array_equal(part.fetch(rows)["id"], part.chosen[rows])
