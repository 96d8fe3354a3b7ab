"""Windows and flips on the way into a batch."""

from __future__ import annotations

import numpy as np
import pytest

from diffusion_jax import data
from diffusion_jax.data.arrays import ArraySource, from_uint8
from diffusion_jax.data.spec import DataSpec
from diffusion_jax.data.transforms import HorizontalFlip, mirrored, windows


@pytest.fixture
def images():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 4, 6, 3), dtype=np.uint8)
    spec = DataSpec(shape=(4, 6, 3), kind="image")
    return ArraySource(spec=spec, x=pixels, example_ids=np.arange(64))


def test_all_pixel_values_meet_their_exact_place():
    values = from_uint8(np.arange(256, dtype=np.uint8))
    assert values.dtype == np.float32
    assert (values[0], values[255]) == (-1.0, 1.0)
    np.testing.assert_allclose(values.astype(np.float64) * 127.5 + 127.5, np.arange(256), atol=1e-5)


def test_half_of_the_images_are_mirrored_and_none_is_changed_otherwise(images):
    flipped = HorizontalFlip(source=images)
    indices = np.tile(np.arange(64), 40)
    batch = flipped.fetch(indices, np.arange(len(indices)))
    plain = images.fetch(indices)
    same = (batch["x"] == plain["x"]).all(axis=(1, 2, 3))
    mirrored = (batch["x"] == plain["x"][:, :, ::-1, :]).all(axis=(1, 2, 3))
    assert (same ^ mirrored).all()
    assert abs(mirrored.mean() - 0.5) < 4 * 0.5 / np.sqrt(len(indices))
    # Each example is seen both ways in the course of the epochs.
    assert (mirrored.reshape(40, 64).any(axis=0) & same.reshape(40, 64).any(axis=0)).all()
    np.testing.assert_array_equal(batch["id"], plain["id"])


def test_flips_follow_the_position_whatever_the_process(images):
    whole = data.Loader(source=HorizontalFlip(source=images), batch_size=8, seed=0)
    parts = [
        data.Loader(
            source=HorizontalFlip(source=images),
            batch_size=8,
            seed=0,
            rows=np.array(rows),
        )
        for rows in (range(4), range(4, 8))
    ]
    joined = np.concatenate([part.batch(24)["x"] for part in parts])
    np.testing.assert_array_equal(joined, whole.batch(24)["x"])


def test_validation_is_never_flipped(images):
    for batch in data.sequential_batches(HorizontalFlip(source=images), 64):
        np.testing.assert_array_equal(batch["x"], images.fetch(np.arange(64))["x"])


def test_windows_are_uniform_in_both_directions_and_follow_id_and_position():
    ids, positions = np.tile(np.arange(10), 400), np.arange(4000)
    spare = np.tile(np.array([[3, 7]]), (4000, 1))
    corners = windows(ids, positions, spare)
    for axis, places in ((0, 4), (1, 8)):
        counts = np.bincount(corners[:, axis], minlength=places)
        assert len(counts) == places
        expected = 4000 / places
        assert np.abs(counts - expected).max() < 4.5 * np.sqrt(expected)
    # The two directions, and flips, are drawn apart.
    both = np.bincount(corners[:, 0] * 8 + corners[:, 1], minlength=32)
    assert np.abs(both - 125).max() < 4.5 * np.sqrt(125)
    left = corners[:, 1] < 4
    assert abs((left == mirrored(ids, positions)).mean() - 0.5) < 4.5 * 0.5 / np.sqrt(4000)
    np.testing.assert_array_equal(windows(ids[7:8], positions[7:8], spare[7:8])[0], corners[7])


def test_without_positions_windows_stand_in_the_middle():
    spare = np.array([[0, 4], [3, 0], [0, 0]])
    assert windows(np.arange(3), None, spare).tolist() == [[0, 2], [1, 0], [0, 0]]
