"""Mean and covariance of features, streamed in one pass in float64.

Features are taken in blocks of a fixed number of examples, in the order in which they come, so that
the same examples give the same bits however they were split into batches, devices and processes.
Memory does not grow with their number.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import numpy as np
from jaxtyping import Float64

from diffusion_jax.errors import ConfigError

BLOCK = 1024
GROUPS = 10
"""Parts of a set whose moments are also kept apart, for an error bar."""


@dataclasses.dataclass(frozen=True)
class Moments:
    """Of `count` examples in D dimensions.

    Attributes:
        count: how many.
        mean: [D].
        scatter: [D, D], the sum of outer products of the deviations from the mean.
    """

    count: int
    mean: Float64[np.ndarray, " d"]
    scatter: Float64[np.ndarray, "d d"]

    @property
    def covariance(self) -> Float64[np.ndarray, "d d"]:
        """The unbiased one, with count - 1."""
        if self.count < 2:
            raise ConfigError(f"{self.count} examples have no covariance; expected at least 2")
        return self.scatter / (self.count - 1)

    @functools.cached_property
    def root(self) -> Float64[np.ndarray, "d k"]:
        """R with R R' = covariance; directions without variance are left out."""
        values, vectors = np.linalg.eigh(0.5 * (self.covariance + self.covariance.T))
        kept = values > rounding(values)
        return vectors[:, kept] * np.sqrt(values[kept])

    @classmethod
    def of(cls, features: Any) -> Moments:
        """Of features [n, D] at once."""
        features = np.asarray(features, np.float64)
        mean = features.mean(0)
        centred = features - mean
        return cls(len(features), mean, centred.T @ centred)

    @classmethod
    def given(cls, mean: Any, covariance: Any, count: int) -> Moments:
        """From published statistics."""
        scatter = np.asarray(covariance, np.float64) * (count - 1)
        return cls(count, np.asarray(mean, np.float64), scatter)

    def __add__(self, other: Moments) -> Moments:
        """Of both sets together (Chan et al. 1979)."""
        count = self.count + other.count
        apart = other.mean - self.mean
        share = other.count / count
        scatter = self.scatter + other.scatter
        scatter = scatter + np.outer(apart, apart) * (self.count * share)
        return Moments(count, self.mean + apart * share, scatter)


def rounding(eigenvalues: np.ndarray) -> float:
    """How large rounding alone makes an eigenvalue that is 0."""
    largest = np.abs(eigenvalues).max(initial=0.0)
    return float(len(eigenvalues) * np.finfo(np.float64).eps * largest)


class MomentStream:
    """Collects features batch by batch.

    Each block is dealt out at random to `groups` parts, so that these are of one size, and alike
    although classes may come in turn; `total` adds them up.
    """

    def __init__(self, groups: int = GROUPS) -> None:
        self.count = 0
        self._parts: list[Moments | None] = [None] * groups
        self._taken = 0
        self._waiting: list[np.ndarray] = []

    def add(self, features: Any) -> None:
        """Takes features [n, D] of the next n examples, all finite."""
        features = np.asarray(features)
        self.count += len(features)
        self._waiting.append(features)
        if self.count - self._taken < BLOCK:
            return
        rows = np.concatenate(self._waiting)
        whole = len(rows) - len(rows) % BLOCK
        for start in range(0, whole, BLOCK):
            self._parts = self._with(rows[start : start + BLOCK])
            self._taken += BLOCK
        self._waiting = [rows[whole:]]

    def _with(self, rows: np.ndarray) -> list[Moments | None]:
        """The parts with the rows that come next."""
        groups, found = len(self._parts), list(self._parts)
        order = np.random.default_rng(self._taken).permutation(len(rows))
        for place, before in enumerate(self._parts):
            own = order[(place - self._taken) % groups :: groups]
            if len(own):
                new = Moments.of(rows[own])
                found[place] = new if before is None else before + new
        return found

    def parts(self) -> list[Moments]:
        """The moments of each part that has any examples."""
        rest = np.concatenate(self._waiting) if self._waiting else np.zeros((0, 0))
        return [part for part in self._with(rest) if part is not None]

    def total(self) -> Moments:
        """The moments of all.

        Raises:
            ConfigError: nothing was added.
        """
        if not self.count:
            raise ConfigError("no features: expected at least one example")
        return together(self.parts())


def together(parts: list[Moments]) -> Moments:
    """The moments of all parts, added in order."""
    result = parts[0]
    for part in parts[1:]:
        result = result + part
    return result


def error_of_parts(counts: Any, slopes: Any) -> float:
    """Standard error of a statistic of all parts together, to first order.

    The infinitesimal jackknife over parts (Jaeckel 1972; Efron 1982, chapter 6): what leaving out a
    part at a time tells, without computing the statistic so often.

    Args:
        counts: [G], examples of each part.
        slopes: [G], derivative of the statistic from all examples towards those of each part alone;
            for a mean, the part's less that of all.

    Returns:
        The standard error; infinite for fewer than two parts.
    """
    counts, slopes = np.asarray(counts, np.float64), np.asarray(slopes, np.float64)
    if len(counts) < 2:
        return math.inf
    share = counts / counts.sum()
    moves = share * slopes
    # 1 / (1 - 1/G) for equal parts.
    return math.sqrt(float(moves @ moves) / (1.0 - float(share @ share)))
