"""Latents out of NumPy files."""

from __future__ import annotations

import numpy as np
import pytest

from diffusion_jax import data
from diffusion_jax.errors import ConfigError, DataError

SHAPE = (2, 3, 4)
OPTIONS = {"shape": SHAPE, "num_classes": 5, "scale": 0.5, "shift": 1.0}


def write(folder, split, sizes, first=0.0, dtype=np.float16, shape=SHAPE, label=None):
    (folder / split).mkdir(parents=True)
    count = 0
    for number, size in enumerate(sizes):
        values = first + np.arange(count, count + size, dtype=dtype)
        x = np.broadcast_to(values.reshape(-1, 1, 1, 1), (size, *shape)).astype(dtype)
        np.save(folder / split / f"x-{number:05d}.npy", x)
        labels = np.arange(count, count + size) % 5 if label is None else np.full(size, label)
        np.save(folder / split / f"label-{number:05d}.npy", labels)
        count += size
    return folder


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, "train", (3, 4))
    return write(tmp_path, "validation", (2,), first=100.0)


def test_parts_are_joined_scaled_and_numbered(folder):
    train = data.load("latents", "train", path=str(folder), **OPTIONS)
    assert len(train) == 7
    assert train.spec.shape == SHAPE
    batch = train.fetch(np.array([6, 0, 3]))
    assert batch["x"].dtype == np.float32
    np.testing.assert_array_equal(batch["x"][:, 1, 2, 3], [2.5, -0.5, 1.0])
    np.testing.assert_array_equal(batch["conditioning"]["label"], [1, 0, 3])
    np.testing.assert_array_equal(batch["id"], [6, 0, 3])
    held_out = data.load("latents", "validation", path=str(folder), **OPTIONS)
    np.testing.assert_array_equal(held_out.ids(np.arange(2)), [7, 8])
    assert held_out.fetch(np.array([0]))["x"][0, 0, 0, 0] == 49.5


def test_labels_are_not_needed_without_classes(folder):
    for file in folder.glob("*/label*.npy"):
        file.unlink()
    train = data.load("latents", "train", path=str(folder), **OPTIONS | {"num_classes": 0})
    assert train.fetch(np.array([0]))["conditioning"] == {}


def test_a_batch_may_be_changed(folder):
    train = data.load("latents", "train", path=str(folder), **OPTIONS)
    before = train.fetch(np.array([1]))["x"].copy()
    train.fetch(np.array([1]))["x"][:] = 0.0
    np.testing.assert_array_equal(train.fetch(np.array([1]))["x"], before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": ""}, r"data.path='': .*diffusion_jax.prepare"),
        ({"path": "/nowhere"}, r"data.path=/nowhere: .*diffusion_jax.prepare"),
        ({"shape": (2, 3, 8)}, r"float16 \[3, 2, 3, 4\]; expected floats \[n, 2, 3, 8\]"),
        ({"num_classes": 4}, "labels from 0 to 4"),
    ],
)
def test_what_is_missing_or_does_not_fit_is_said(folder, changes, message):
    with pytest.raises(DataError, match=message):
        data.load("latents", "train", **{"path": str(folder), **OPTIONS, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": (2, 3)}, r"shape=\(2, 3\): expected \(height, width, channels\)"),
        ({"num_classes": -1}, "num_classes=-1: expected 0 or more"),
        ({"shift": np.nan}, "shift=nan: expected a finite number"),
        ({"scale": 0.0}, "scale=0.0: expected a positive number"),
    ],
)
def test_options_out_of_range(folder, changes, message):
    with pytest.raises(ConfigError, match=message):
        data.load("latents", "train", path=str(folder), **OPTIONS | changes)


def test_a_file_cut_short_and_missing_labels(folder):
    x = folder / "train" / "x-00001.npy"
    (folder / "train" / "label-00000.npy").unlink()
    with pytest.raises(DataError, match=r"label-00000.npy: missing beside x-00000.npy"):
        data.load("latents", "train", path=str(folder), **OPTIONS)
    x.write_bytes(x.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"x-00001.npy is no NumPy array or cut short"):
        data.load("latents", "train", path=str(folder), **OPTIONS | {"num_classes": 0})


def test_values_that_are_not_finite(folder):
    x = np.load(folder / "train" / "x-00000.npy")
    x[1, 0, 0, 0] = np.inf
    np.save(folder / "train" / "x-00000.npy", x)
    train = data.load("latents", "train", path=str(folder), **OPTIONS)
    train.fetch(np.array([0, 2]))
    with pytest.raises(DataError, match="latent number 1 is not finite"):
        train.fetch(np.array([0, 1, 2]))
