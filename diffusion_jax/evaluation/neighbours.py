"""Scores from nearest neighbours in feature space: how real, how varied, and how much is copied."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from diffusion_jax.diffusion.likelihood import Estimate, estimate
from diffusion_jax.errors import ConfigError

PRECISION_NEIGHBOURS = 3
"""Of precision and recall (Kynkaanniemi et al. 2019)."""
DENSITY_NEIGHBOURS = 5
"""Of density and coverage (Naeem et al. 2020)."""
COPY_RATIO = 1.0 / 3.0
"""A sample this much nearer to one training example than to the next is a copy (Yoon et al.
2023)."""
ROWS = 1024


def _blocks(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[slice, Float[np.ndarray, "rows m"]]]:
    """Squared distances of all pairs, [rows, m] at a time: memory grows with m alone."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    norms = (y**2).sum(1)
    for start in range(0, len(x), ROWS):
        rows = slice(start, min(start + ROWS, len(x)))
        part = x[rows]
        squares = (part**2).sum(1)[:, None] + norms - 2.0 * part @ y.T
        yield rows, np.maximum(squares, 0.0)


def radii(x: Any, neighbours: int) -> Float[np.ndarray, " n"]:
    """Squared distance of each example to its k-th nearest other one.

    Raises:
        ConfigError: not more than k examples.
    """
    if len(x) <= neighbours:
        raise ConfigError(
            f"{len(x)} examples: a score of {neighbours} neighbours needs at least "
            f"{neighbours + 1} of the samples and of the reference"
        )
    found = np.empty(len(x))
    for rows, squares in _blocks(x, x):
        # Itself is at distance 0, to rounding: it is left out by place, not by value.
        squares[np.arange(len(squares)), np.arange(rows.start, rows.stop)] = np.inf
        found[rows] = np.partition(squares, neighbours - 1, axis=1)[:, neighbours - 1]
    return found


def precision_recall(
    samples: Any, reference: Any, neighbours: int = PRECISION_NEIGHBOURS
) -> tuple[Estimate, Estimate]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, equations 1 and 2).

    Precision is the share of samples within the balls of the reference, which reach to the k-th
    neighbour of each; recall that of the reference within the balls of the samples. Standard errors
    are those of a share, the balls being given.
    """
    reference_radii, sample_radii = radii(reference, neighbours), radii(samples, neighbours)
    inside: Bool[np.ndarray, " n"] = np.zeros(len(samples), bool)
    covered: Bool[np.ndarray, " m"] = np.zeros(len(reference), bool)
    for rows, squares in _blocks(samples, reference):
        inside[rows] = (squares <= reference_radii).any(1)
        covered |= (squares <= sample_radii[rows][:, None]).any(0)
    return estimate(inside), estimate(covered)


def density_coverage(
    samples: Any, reference: Any, neighbours: int = DENSITY_NEIGHBOURS
) -> tuple[Estimate, Estimate]:
    """Density and coverage (Naeem et al. 2020, equations 4 and 5).

    Density is the number of balls of the reference that hold a sample, over k: about 1 for samples
    of the same law, and not limited to it. Coverage is the share of balls that hold any sample.
    """
    reach = radii(reference, neighbours)
    holding = np.zeros(len(samples))
    covered = np.zeros(len(reference), bool)
    for rows, squares in _blocks(samples, reference):
        within = squares <= reach
        holding[rows] = within.sum(1) / neighbours
        covered |= within.any(0)
    return estimate(holding), estimate(covered)


class Nearest(NamedTuple):
    """The nearest training example of each sample.

    Attributes:
        index: its place [n].
        distance: to it [n].
        ratio: that distance over the one to the next nearest [n], 0 to 1.
    """

    index: Int[np.ndarray, " n"]
    distance: Float[np.ndarray, " n"]
    ratio: Float[np.ndarray, " n"]


class NearestStream:
    """Finds them while the training examples stream by: memory grows with the samples alone."""

    def __init__(self, samples: Any) -> None:
        self._samples = np.asarray(samples, np.float64)
        self._squares = np.full((len(self._samples), 2), np.inf)
        self._index = np.zeros((len(self._samples), 2), np.int64)
        self._seen = 0

    def add(self, training: Any) -> None:
        """Takes the features [m, D] of the next m training examples."""
        for rows, squares in _blocks(self._samples, training):
            places = np.broadcast_to(np.arange(len(training)) + self._seen, squares.shape)
            all_squares = np.concatenate([self._squares[rows], squares], axis=1)
            all_places = np.concatenate([self._index[rows], places], axis=1)
            best = np.argsort(all_squares, axis=1, kind="stable")[:, :2]
            self._squares[rows] = np.take_along_axis(all_squares, best, 1)
            self._index[rows] = np.take_along_axis(all_places, best, 1)
        self._seen += len(training)

    def result(self) -> Nearest:
        """The nearest of all so far.

        Raises:
            ConfigError: fewer than two training examples were seen.
        """
        if self._seen < 2:
            raise ConfigError(f"{self._seen} training examples: expected at least 2")
        distances = np.sqrt(self._squares)
        ratio = distances[:, 0] / np.maximum(distances[:, 1], np.finfo(np.float64).tiny)
        return Nearest(self._index[:, 0], distances[:, 0], ratio)


def memorisation(nearest: Nearest, ratio: float = COPY_RATIO) -> Estimate:
    """Share of samples that are copies: much nearer to one training example than to any other.

    An example that is twice in the training set hides its copies, as it is its own next nearest.
    """
    if not math.isfinite(ratio) or ratio <= 0.0:
        raise ConfigError(f"ratio={ratio}: expected a positive number, such as 0.333")
    return estimate(nearest.ratio < ratio)
