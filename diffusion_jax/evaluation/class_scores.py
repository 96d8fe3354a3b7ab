"""Scores from a classifier's predictions: the Inception score and class accuracy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jaxtyping import Float

from diffusion_jax.diffusion.likelihood import Estimate, estimate
from diffusion_jax.errors import ConfigError

SPLITS = 10


def log_probabilities(logits: Any) -> Float[np.ndarray, "n classes"]:
    """log softmax over the classes, in float64."""
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


class ClassStream:
    """Collects what both scores need of logits; memory does not grow with their number.

    Args:
        expected: samples in all, which decides where a part of the Inception score ends.
        splits: parts of it.
    """

    def __init__(self, expected: int, splits: int = SPLITS) -> None:
        self.count, self._right, self._asked = 0, 0, 0
        self._ends = [len(part) for part in np.array_split(np.arange(expected), splits)]
        self._bounds = np.cumsum(self._ends)
        self._splits = splits
        self._sums: list[Any] = [None] * splits
        self._entropies = np.zeros(splits)
        self._counts = np.zeros(splits, np.int64)

    def add(self, logits: Any, index: Any, labels: Any = None) -> None:
        """Takes logits [n, classes] of the samples at `index`, and the classes asked for."""
        logs = log_probabilities(logits)
        self.count += len(logs)
        if labels is not None:
            self._right += int((logs.argmax(1) == np.asarray(labels)).sum())
            self._asked += len(logs)
        places = np.searchsorted(self._bounds, np.asarray(index), side="right")
        for place in np.unique(places):
            part = logs[places == place]
            before = self._sums[place]
            total = np.exp(part).sum(0)
            self._sums[place] = total if before is None else before + total
            self._entropies[place] += float((np.exp(part) * part).sum())
            self._counts[place] += len(part)

    def inception_score(self) -> Estimate:
        """exp(E KL(p(y|x) | p(y))), Salimans et al. 2016: the mean over the parts.

        Its standard error is that of the mean over the parts; published ones are the deviation of
        the parts, sqrt(splits) times as much. Few samples a part make the score smaller.

        Raises:
            ConfigError: fewer than 2 samples a part.
        """
        if self._counts.min() < 2:
            raise ConfigError(
                f"{self.count} samples: the Inception score in {self._splits} parts needs at least "
                f"{2 * self._splits}"
            )
        values = []
        for total, entropy, count in zip(self._sums, self._entropies, self._counts, strict=True):
            marginal = total / count
            logs = np.log(np.maximum(marginal, np.finfo(np.float64).tiny))
            values.append(math.exp(entropy / count - float(marginal @ logs)))
        return estimate(values)._replace(n=self.count)

    def accuracy(self) -> Estimate:
        """Share of samples that the classifier takes for the class that was asked for.

        Raises:
            ConfigError: no classes were asked for.
        """
        if not self._asked:
            raise ConfigError("class_accuracy: the samples were asked for no class")
        right = np.zeros(self._asked)
        right[: self._right] = 1.0
        return estimate(right)


def inception_score(logits: Any, splits: int = SPLITS) -> Estimate:
    """`ClassStream.inception_score` of logits [n, classes] at once."""
    stream = ClassStream(len(logits), splits)
    stream.add(logits, np.arange(len(logits)))
    return stream.inception_score()


def class_accuracy(logits: Any, labels: Any) -> Estimate:
    """`ClassStream.accuracy` of logits [n, classes] and classes [n] at once."""
    stream = ClassStream(len(logits))
    stream.add(logits, np.arange(len(logits)), labels)
    return stream.accuracy()
