"""Neighbour scores against what they must be of samples of the same law, and brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from diffusion_jax.errors import ConfigError
from diffusion_jax.evaluation import class_scores, neighbours


def normal(seed, n, d=4):
    return np.random.default_rng(seed).normal(size=(n, d))


def test_the_same_set_and_far_sets():
    x = normal(0, 60)
    for pair in (neighbours.precision_recall, neighbours.density_coverage):
        assert [score.value for score in pair(x, x + 100.0)] == [0.0, 0.0]
    assert [score.value for score in neighbours.precision_recall(x, x)] == [1.0, 1.0]
    assert neighbours.density_coverage(x, x)[1].value == 1.0


def test_few_modes_are_precise_and_recall_little():
    x = normal(0, 400, 2)
    narrow = 0.05 * normal(1, 400, 2)
    precision, recall = neighbours.precision_recall(narrow, x)
    assert precision.value > 0.95
    assert recall.value < 0.2


def test_samples_of_the_same_law_have_the_known_density_and_coverage():
    """E density = 1, E coverage = 1 - prod_(j<=k) (M - j)/(M + N - j) for any law."""
    n, m, k, runs = 50, 80, 5, 300
    found = np.array(
        [
            [
                score.value
                for score in neighbours.density_coverage(normal(2 * r, n), normal(2 * r + 1, m))
            ]
            for r in range(runs)
        ]
    )
    # The k-th neighbour of one of M is farther than all N samples with this chance: of the other
    # M - 1 and the N, the k nearest are all of the M - 1.
    missed = math.prod((m - j) / (m + n - j) for j in range(1, k + 1))
    error = found.std(0) / math.sqrt(runs)
    assert abs(found[:, 0].mean() - 1.0) < 3 * error[0] < 0.05
    assert abs(found[:, 1].mean() - (1.0 - missed)) < 3 * error[1] < 0.02


def test_nearest_neighbours_are_those_of_brute_force_whatever_the_blocks():
    x, y = normal(0, 30), normal(1, 500)
    distances = np.sqrt(((x[:, None] - y[None]) ** 2).sum(-1))
    order = distances.argsort(1)
    for cuts in ([500], [1, 2, 497], [100] * 5):
        stream = neighbours.NearestStream(x)
        for part in np.split(y, np.cumsum(cuts)[:-1]):
            stream.add(part)
        found = stream.result()
        np.testing.assert_array_equal(found.index, order[:, 0])
        np.testing.assert_allclose(found.distance, distances.min(1), rtol=1e-6)
        two = np.sort(distances, 1)[:, :2]
        np.testing.assert_allclose(found.ratio, two[:, 0] / two[:, 1], rtol=1e-6)


def test_copies_are_counted():
    training = normal(1, 300)
    samples = np.concatenate([training[:15] + 1e-3, normal(2, 45)])
    stream = neighbours.NearestStream(samples)
    stream.add(training)
    found = neighbours.memorisation(stream.result())
    assert 0.25 <= found.value < 0.35
    assert found.n == 60


def test_copies_of_an_example_that_is_twice_in_the_training_set():
    """Exact ones are counted; near ones are as near to the one as to the other."""
    training = normal(1, 300)
    twice = np.concatenate([training, training[:20]])

    def ratios(samples, training):
        stream = neighbours.NearestStream(samples)
        stream.add(training)
        return stream.result()

    exact, near = ratios(training[:20], twice), ratios(training[:20] + 1e-3, twice)
    assert neighbours.memorisation(exact).value == 1.0
    assert neighbours.memorisation(near).value == 0.0
    assert neighbours.memorisation(ratios(training[:20] + 1e-3, training)).value > 0.9


def test_inception_score_of_drawn_predictions_in_odd_batches():
    count, splits, classes = 103, 10, 7
    random = np.random.default_rng(3)
    logits = 2.0 * random.normal(size=(count, classes)) + random.normal(size=classes)
    stream, order = class_scores.ClassStream(count, splits), random.permutation(count)
    for index in np.split(order, [1, 30, 37, 88]):
        stream.add(logits[index], index)
    found = stream.inception_score()
    expected = []
    for part in np.array_split(logits, splits):
        likely = np.exp(part) / np.exp(part).sum(1, keepdims=True)
        nats = scipy.stats.entropy(likely, likely.mean(0, keepdims=True), axis=1)
        expected.append(np.exp(nats.mean()))
    assert 1.2 < min(expected) < max(expected) < 0.8 * classes
    np.testing.assert_allclose(found.value, np.mean(expected), rtol=1e-12)
    error = np.std(expected, ddof=1) / splits**0.5
    np.testing.assert_allclose(found.standard_error, error, rtol=1e-10)
    assert found.n == count


def test_inception_score_of_known_predictions():
    classes, n = 10, 1000
    sure = 50.0 * np.eye(classes)[np.arange(n) % classes]
    np.testing.assert_allclose(class_scores.inception_score(sure).value, classes, rtol=1e-6)
    same = np.tile(np.random.default_rng(0).normal(size=classes), (n, 1))
    np.testing.assert_allclose(class_scores.inception_score(same).value, 1.0, rtol=1e-9)
    found = class_scores.class_accuracy(sure, np.arange(n) % classes)
    assert found.value == 1.0
    assert class_scores.class_accuracy(sure, np.zeros(n)).value == 0.1


def test_mistakes_are_one_line():
    with pytest.raises(ConfigError, match="3 examples: a score of 3 neighbours needs at least 4"):
        neighbours.precision_recall(np.zeros((3, 2)), np.zeros((9, 2)))
    stream = neighbours.NearestStream(np.zeros((3, 2)))
    stream.add(np.zeros((1, 2)))
    with pytest.raises(ConfigError, match="1 training examples: expected at least 2"):
        stream.result()
    with pytest.raises(ConfigError, match="19 samples: the Inception score in 10 parts"):
        class_scores.inception_score(np.zeros((19, 3)))
