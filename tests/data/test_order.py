"""The order of examples: permutations that are pure, all different, and unbiased."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from diffusion_jax.data.order import shuffled_indices


@pytest.mark.parametrize(
    "length", [1, 2, 3, 5, 8, 64, 1400, 8191, 8192, 8193, 16_384, 16_385, 60_000]
)
def test_each_epoch_shows_every_index_once(length):
    epochs = shuffled_indices(0, 3 * length, length, seed=5).reshape(3, length)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(length))


def test_epochs_and_seeds_have_different_orders():
    orders = np.concatenate(
        [shuffled_indices(0, 4000, 1000, seed).reshape(4, 1000) for seed in (0, 1, 2)]
    )
    for i in range(len(orders)):
        for j in range(i):
            # Two random permutations agree in one place on average (Poisson with mean 1).
            assert np.sum(orders[i] == orders[j]) < 10


@pytest.mark.parametrize("length", [1797, 9000])
def test_any_stretch_equals_the_same_stretch_of_the_whole(length):
    whole = shuffled_indices(0, 30_000, length, seed=1)
    for start, count in [(0, 1), (8191, 2), (8192, 8192), (5, 20_000), (29_999, 1)]:
        np.testing.assert_array_equal(
            shuffled_indices(start, count, length, seed=1), whole[start : start + count]
        )


def test_a_caller_cannot_change_later_answers():
    first = shuffled_indices(0, 100, 100, seed=0)
    first[:] = 0
    assert len(set(shuffled_indices(0, 100, 100, seed=0).tolist())) == 100


@pytest.mark.parametrize("length", [2, 5, 16])
def test_every_order_of_a_few_is_equally_likely_in_every_place(length):
    epochs = shuffled_indices(0, 20_000 * length, length, seed=3).reshape(20_000, length)
    for place in range(length):
        counts = np.bincount(epochs[:, place], minlength=length)
        assert stats.chisquare(counts).pvalue > 1e-4
    if length == 5:
        _, counts = np.unique(epochs, axis=0, return_counts=True)
        assert len(counts) == 120
        assert stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("length", [4096, 9000])
def test_orders_look_random(length):
    epochs = shuffled_indices(0, 20 * length, length, seed=0).reshape(20, length)
    place = np.arange(length)
    for epoch in epochs.astype(np.float64):
        error = 1.0 / np.sqrt(length)
        assert abs(np.corrcoef(epoch[:-1], epoch[1:])[0, 1]) < 4.0 * error
        assert abs(np.corrcoef(epoch, place)[0, 1]) < 4.0 * error
        # Half of all steps go up, as in a random order (variance n / 12).
        ups = np.sum(np.diff(epoch) > 0) - (length - 1) / 2
        assert abs(ups) < 4.5 * np.sqrt(length / 12)
    # What stands in one place in one epoch says nothing about the next.
    for before, after in itertools.pairwise(epochs.astype(np.float64)):
        assert abs(np.corrcoef(before, after)[0, 1]) < 4.0 / np.sqrt(length)


def test_every_index_is_equally_likely_in_a_place_of_a_long_epoch():
    length = 8193  # the least that is not sorted, and the most cycles to walk
    starts = np.array([shuffled_indices(e * length, 1, length, seed=0)[0] for e in range(400)])
    counts, _ = np.histogram(starts, bins=10, range=(0, length))
    assert stats.chisquare(counts).pvalue > 1e-4


def test_far_positions_and_huge_data_sets():
    length = 10**12
    indices = shuffled_indices(10**15, 256, length, seed=0)
    assert indices.min() >= 0
    assert indices.max() < length
    assert len(set(indices.tolist())) == 256


@pytest.mark.parametrize(
    ("length", "start", "expected"),
    [
        (6, 0, [0, 1, 3, 5, 4, 2, 3, 0, 1, 5, 2, 4]),
        (20_000, 123_456, [11073, 18191, 363, 9634, 9091, 18464]),
    ],
)
def test_recorded_order(length, start, expected):
    # A checkpoint's position means these examples: if this fails, resumed runs see others.
    assert shuffled_indices(start, len(expected), length, seed=0).tolist() == expected
