"""Scores from nearest neighbours in feature space: how real, how varied, and how much is copied."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from diffusion_jax.diffusion.likelihood import Estimate, estimate
from diffusion_jax.errors import ConfigError
from diffusion_jax.evaluation import distances
from diffusion_jax.evaluation.distances import Points

PRECISION_NEIGHBOURS = 3
"""Of precision and recall (Kynkaanniemi et al. 2019)."""
DENSITY_NEIGHBOURS = 5
"""Of density and coverage (Naeem et al. 2020)."""
COPY_RATIO = 1.0 / 3.0
"""A sample this much nearer to one training example than to the next is a copy (Yoon et al.
2023)."""


def radii(x: Any, neighbours: int) -> Float[np.ndarray, " n"]:
    """Squared distance of each example to its k-th nearest other one.

    Raises:
        ConfigError: not more than k examples.
    """
    points = x if isinstance(x, Points) else Points.of(x)
    if len(points.values) <= neighbours:
        raise ConfigError(
            f"{len(points.values)} examples: a score of {neighbours} neighbours needs at least "
            f"{neighbours + 1} of the samples and of the reference"
        )
    found = np.empty(len(points.values))
    for block in distances.blocks(points, points):
        # Itself, at distance 0, is left out by place: others may be there as well.
        row, column, squares = block.nearest(neighbours + 1)
        other = column != row + block.rows.start
        pairs = row[other], column[other], squares[other]
        found[block.rows] = distances.smallest(*pairs, len(block.squares), neighbours)[0][:, -1]
    return found


def _both(samples: Any, reference: Any) -> tuple[Points, Points]:
    """Both from the centre of the reference."""
    y = Points.of(reference)
    return Points.of(samples, y.centre), y


def precision_recall(
    samples: Any, reference: Any, neighbours: int = PRECISION_NEIGHBOURS
) -> tuple[Estimate, Estimate]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, equations 1 and 2).

    Precision is the share of samples within the balls of the reference, which reach to the k-th
    neighbour of each; recall that of the reference within the balls of the samples. Standard errors
    are those of a share, the balls being given.
    """
    x, y = _both(samples, reference)
    reference_radii, sample_radii = radii(y, neighbours), radii(x, neighbours)
    inside: Bool[np.ndarray, " n"] = np.zeros(len(samples), bool)
    covered: Bool[np.ndarray, " m"] = np.zeros(len(reference), bool)
    for block in distances.blocks(x, y):
        inside[block.rows] = block.within(reference_radii).any(1)
        covered |= block.within(sample_radii[block.rows, None]).any(0)
    return estimate(inside), estimate(covered)


def density_coverage(
    samples: Any, reference: Any, neighbours: int = DENSITY_NEIGHBOURS
) -> tuple[Estimate, Estimate]:
    """Density and coverage (Naeem et al. 2020, equations 4 and 5).

    Density is the number of balls of the reference that hold a sample, over k: about 1 for samples
    of the same law, and not limited to it. Coverage is the share of balls that hold any sample.
    """
    x, y = _both(samples, reference)
    reach = radii(y, neighbours)
    holding = np.zeros(len(samples))
    covered = np.zeros(len(reference), bool)
    for block in distances.blocks(x, y):
        within = block.within(reach)
        holding[block.rows] = within.sum(1) / neighbours
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
        self._samples = Points.of(samples)
        self._squares = np.full((len(self._samples.values), 2), np.inf)
        self._index = np.zeros((len(self._samples.values), 2), np.int64)
        self._seen = 0

    def add(self, training: Any) -> None:
        """Takes the features [m, D] of the next m training examples."""
        new = Points.of(training, self._samples.centre)
        for block in distances.blocks(self._samples, new):
            known, places = self._squares[block.rows], self._index[block.rows]
            count = min(2, len(new.values))
            row, column, squares = block.nearest(count, known[:, 1])
            before = np.repeat(np.arange(len(known)), 2), places.ravel(), known.ravel()
            after = row, column + self._seen, squares
            rows, where, all_squares = (
                np.concatenate(both) for both in zip(before, after, strict=True)
            )
            found = distances.smallest(rows, where, all_squares, len(known), 2)
            self._squares[block.rows], self._index[block.rows] = found
        self._seen += len(new.values)

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

    Of an example that is twice in the training set, exact copies are counted, at the distance 0
    from both; near ones are not, being as near to the one as to the other.
    """
    if not math.isfinite(ratio) or ratio <= 0.0:
        raise ConfigError(f"ratio={ratio}: expected a positive number, such as 0.333")
    return estimate(nearest.ratio < ratio)
