"""Neighbours found by products in float32 against all differences in float64."""

from __future__ import annotations

import numpy as np
import pytest

from diffusion_jax.evaluation import distances, neighbours
from diffusion_jax.evaluation.distances import Points


def squared(x, y):
    apart = x[:, None].astype(np.float64) - y[None]
    return np.einsum("xyd,xyd->xy", apart, apart)


def of(kind):
    """Sets whose neighbours float32 confuses: far from 0, nearly equal, equal, of whole numbers."""
    random = np.random.default_rng(0)
    x, y = random.normal(size=(2, 150, 20))
    if kind == "far":
        x, y = 300.0 + 1e-2 * x, 300.0 + 1e-2 * y
    if kind == "near":
        y[75:] = y[:75] + 1e-5 * random.normal(size=(75, 20))
        x[:50] = y[:50] + 1e-5 * random.normal(size=(50, 20))
    if kind == "equal":
        x, y = np.tile(x[:30], (5, 1)), np.concatenate([x[:100], y[:50]])
    if kind == "whole":
        x, y = random.integers(0, 2, (2, 150, 20)).astype(float)
    return x.astype(np.float32), y.astype(np.float32)


KINDS = ("normal", "far", "near", "equal", "whole")


@pytest.mark.parametrize("kind", KINDS)
def test_the_margin_holds_all_rounding(kind):
    x, y = of(kind)
    points = Points.of(y)
    (block,) = distances.blocks(Points.of(x, points.centre), points)
    off = np.abs(block.squares - squared(x, y)).max()
    assert 0.0 < off < block.margin < 1e-3 * squared(x, y).max()


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_neighbours_are_those_of_float64(kind):
    x, y = of(kind)
    own_x, own_y, both = squared(x, x), squared(y, y), squared(x, y)

    def radii(own, k):
        others = np.where(np.eye(len(own), dtype=bool), np.inf, own)
        return np.sort(others, axis=1)[:, k - 1]

    np.testing.assert_allclose(neighbours.radii(y, 3), radii(own_y, 3), rtol=1e-14)
    precision, recall = neighbours.precision_recall(x, y, 3)
    assert precision.value == (both <= radii(own_y, 3)).any(1).mean()
    assert recall.value == (both <= radii(own_x, 3)[:, None]).any(0).mean()
    density, coverage = neighbours.density_coverage(x, y, 5)
    within = both <= radii(own_y, 5)
    np.testing.assert_allclose(density.value, within.sum(1).mean() / 5, rtol=1e-12)
    assert coverage.value == within.any(0).mean()


@pytest.mark.parametrize("kind", KINDS)
def test_nearest_neighbours_are_those_of_float64(kind):
    x, y = of(kind)
    both = squared(x, y)
    stream = neighbours.NearestStream(x)
    for part in np.split(y, [1, 2, 40]):
        stream.add(part)
    found = stream.result()
    np.testing.assert_array_equal(found.index, both.argmin(1))
    np.testing.assert_allclose(found.distance, np.sqrt(both.min(1)), rtol=1e-14)


def test_more_examples_than_a_block():
    x, y = np.random.default_rng(1).normal(size=(2, distances.ROWS + 30, 3))
    points = Points.of(y)
    found = [block.within(0.5) for block in distances.blocks(Points.of(x, points.centre), points)]
    assert len(found) == 2
    np.testing.assert_array_equal(np.concatenate(found), squared(x, y) <= 0.5)
