"""The embedded sources against their definitions and closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from diffusion_jax import data
from diffusion_jax.errors import ConfigError


def everything(source):
    return source.fetch(np.arange(len(source)))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("digits", {}),
        ("heartbeat", {"size": 50, "held_out": 20}),
        ("points", {"size": 50, "held_out": 20}),
        ("points", {"distribution": "moons", "size": 50, "held_out": 20}),
    ],
)
def test_every_source_keeps_the_contract(name, options):
    train, held_out = (data.load(name, split, **options) for split in ("train", "validation"))
    assert not set(everything(train)["id"]) & set(everything(held_out)["id"])
    for source in (train, held_out):
        assert isinstance(source, data.Source)
        batch = source.fetch(np.array([5, 0, 5]), np.array([100, 101, 102]))
        assert set(batch) == {"x", "conditioning", "id"}
        assert batch["x"].shape == (3, *source.spec.shape)
        assert batch["x"].dtype == np.float32
        assert batch["id"].dtype == np.int64
        np.testing.assert_array_equal(batch["x"][0], batch["x"][2])
        np.testing.assert_array_equal(batch["id"], source.ids(np.array([5, 0, 5])))
        assert len(set(everything(source)["id"])) == len(source)
        assert ("label" in batch["conditioning"]) == (source.spec.num_classes > 0)
        if source.spec.num_classes:
            labels = everything(source)["conditioning"]["label"]
            assert labels.dtype == np.int32
            assert set(labels) == set(range(source.spec.num_classes))
        low, high = source.spec.range
        assert low <= everything(source)["x"].min()
        assert everything(source)["x"].max() <= high


def test_digits_are_scikit_learns_with_the_agreed_split():
    from sklearn.datasets import load_digits

    original = load_digits()
    order = np.random.default_rng(0).permutation(1797)
    train, held_out = data.load("digits", "train"), data.load("digits", "validation")
    assert (len(train), len(held_out)) == (1400, 397)
    for source, expected in ((train, order[:1400]), (held_out, order[1400:])):
        batch = everything(source)
        np.testing.assert_array_equal(batch["id"], expected)
        for row in (0, 17, len(source) - 1):
            image = original.images[expected[row]]
            np.testing.assert_array_equal((batch["x"][row, :, :, 0] + 1.0) * 8.0, image)
            assert batch["conditioning"]["label"][row] == original.target[expected[row]]
    assert everything(train)["x"].min() == -1.0
    assert everything(train)["x"].max() == 1.0


def test_heartbeats_beat_every_fifth_place_at_five_phases():
    x = everything(data.load("heartbeat", "train", size=1000))["x"]
    assert x.shape == (1000, 20)
    assert set(np.unique(x)) == {0.0, 1.0}
    assert (x.sum(axis=1) == 4).all()
    for row in x[:10]:
        assert (np.diff(np.flatnonzero(row)) == 5).all()
    _, counts = np.unique(x, axis=0, return_counts=True)
    assert counts.tolist() == [200] * 5


THETA_LOW, THETA_HIGH = 1.5 * np.pi, 4.5 * np.pi


def test_swiss_roll_moments_in_closed_form():
    x = everything(data.load("points", "train", size=200_000))["x"].astype(np.float64)
    width = THETA_HIGH - THETA_LOW

    def over(antiderivative):
        return (antiderivative(THETA_HIGH) - antiderivative(THETA_LOW)) / width

    mean = np.array(
        [over(lambda t: t * np.sin(t) + np.cos(t)), over(lambda t: np.sin(t) - t * np.cos(t))]
    )
    square = over(lambda t: t**3 / 3.0)
    error = x.std(axis=0) / np.sqrt(len(x))
    assert (np.abs(x.mean(axis=0) - mean / 10.0) < 4.0 * error).all()
    radius2 = (x**2).sum(axis=1)
    expected = square / 100.0 + 2.0 * 0.05**2
    assert abs(radius2.mean() - expected) < 4.0 * radius2.std() / np.sqrt(len(x))


def test_swiss_roll_log_density_by_quadrature():
    x = everything(data.load("points", "train", size=4000))["x"].astype(np.float64)
    theta = THETA_LOW + (THETA_HIGH - THETA_LOW) * (np.arange(1500) + 0.5) / 1500
    curve = theta[:, None] * np.stack([np.cos(theta), np.sin(theta)], axis=-1) / 10.0
    distance2 = (x**2).sum(1)[:, None] + (curve**2).sum(1)[None] - 2.0 * x @ curve.T
    density = np.exp(-0.5 * distance2 / 0.05**2).mean(axis=1) / (2.0 * np.pi * 0.05**2)
    bits = np.log2(density)
    # -.8393 bits is the integral of p log2 p over the plane.
    assert abs(bits.mean() + 0.8393) < 4.0 * bits.std() / np.sqrt(len(bits))


def test_gaussian_mixture_components():
    batch = everything(data.load("points", "train", distribution="gaussian_mixture", size=40_000))
    x, label = batch["x"].astype(np.float64), batch["conditioning"]["label"]
    for component in range(8):
        own = x[label == component]
        centre = 1.2 * np.exp(2j * np.pi * component / 8)
        assert abs(len(own) - 5000) < 4.5 * np.sqrt(5000)
        assert np.abs(own.mean(axis=0) - [centre.real, centre.imag]).max() < 0.01
        np.testing.assert_allclose(np.cov(own.T), 0.12**2 * np.eye(2), atol=1.2e-3)


def test_checkerboard_fills_half_of_the_fields_evenly():
    x = everything(data.load("points", "train", distribution="checkerboard", size=16_000))["x"]
    fields = np.floor((x.astype(np.float64) + 1.6) / 0.8).astype(int)
    counts = np.zeros((4, 4), int)
    np.add.at(counts, (fields[:, 0], fields[:, 1]), 1)
    dark = np.add.outer(np.arange(4), np.arange(4)) % 2 == 0
    assert (counts[~dark] == 0).all()
    assert (np.abs(counts[dark] - 2000) < 4.5 * np.sqrt(2000)).all()


@pytest.mark.parametrize(
    ("distribution", "noise"), [("moons", 0.05), ("spiral", 0.04), ("swiss_roll", 0.05)]
)
def test_curves_have_their_thickness(distribution, noise):
    batch = everything(data.load("points", "train", distribution=distribution, size=4000))
    label = batch["conditioning"].get("label", np.zeros(4000, int))
    s = np.linspace(0.0, 1.0, 2000)
    curves = {
        # Two half circles of radius .8, the second turned over and moved by (.8, .4).
        "moons": [
            0.8 * np.exp(1j * np.pi * s) - 0.4 - 0.2j,
            0.8 * np.exp(-1j * np.pi * s) + 0.4 + 0.2j,
        ],
        "spiral": [1.5 * s * np.exp(1j * np.pi * (1.5 * s + 2 * k / 3)) for k in range(3)],
        "swiss_roll": [(t := THETA_LOW + (THETA_HIGH - THETA_LOW) * s) / 10 * np.exp(1j * t)],
    }[distribution]
    x = batch["x"][:, 0] + 1j * batch["x"][:, 1]
    for k, curve in enumerate(curves):
        distance = np.abs(x[label == k][:, None] - curve[None]).min(axis=1)
        # Only the part of the noise across the curve leads away from it.
        assert np.sqrt((distance**2).mean()) == pytest.approx(noise, rel=0.12)


def test_points_depend_on_their_seed_and_index_alone():
    source = data.load("points", "train", distribution="moons", size=1000)
    batch = source.fetch(np.array([999, 3, 500]))
    for row, index in enumerate((999, 3, 500)):
        np.testing.assert_array_equal(source.fetch(np.array([index]))["x"][0], batch["x"][row])
    larger = data.load("points", "train", distribution="moons", size=2000)
    np.testing.assert_array_equal(larger.fetch(np.array([3]))["x"][0], batch["x"][1])
    other = data.load("points", "train", distribution="moons", size=1000, seed=1)
    assert not np.allclose(other.fetch(np.array([3]))["x"][0], batch["x"][1])


@pytest.mark.parametrize(
    ("name", "split", "options", "words"),
    [
        ("digts", "train", {}, ["data.name='digts'", "did you mean 'digits'"]),
        ("digits", "test", {}, ["split='test'", "train, validation"]),
        ("digits", "train", {"size": 3}, ["'size'", "known: binarise"]),
        ("points", "train", {"distrbution": "moons"}, ["did you mean 'distribution'"]),
        ("points", "train", {"distribution": "swissroll"}, ["did you mean 'swiss_roll'"]),
        ("points", "validation", {"held_out": 0}, ["data.points.held_out=0", "at least 1"]),
        ("heartbeat", "train", {"size": 0}, ["data.heartbeat.size=0", "at least 1"]),
        ("heartbeat", "train", {"length": 4}, ["data.heartbeat.length=4", "at least 5"]),
    ],
)
def test_mistakes_end_in_one_line(name, split, options, words):
    with pytest.raises(ConfigError) as error:
        data.load(name, split, **options)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)
