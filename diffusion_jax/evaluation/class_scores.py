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


def inception_score(logits: Any, splits: int = SPLITS) -> Estimate:
    """exp(E KL(p(y|x) | p(y))), Salimans et al. 2016: the mean over `splits` parts in order.

    Its standard error is that of the mean over the parts; published ones are the deviation of the
    parts, sqrt(splits) times as much. Few samples a part make the score smaller.

    Raises:
        ConfigError: fewer than 2 samples a part.
    """
    logs = log_probabilities(logits)
    if len(logs) < 2 * splits:
        raise ConfigError(
            f"{len(logs)} samples: the Inception score in {splits} parts needs at least "
            f"{2 * splits}"
        )
    values = []
    for part in np.array_split(logs, splits):
        marginal = np.log(np.exp(part).mean(0))
        values.append(math.exp(float((np.exp(part) * (part - marginal)).sum(1).mean())))
    return estimate(values)._replace(n=len(logs))


def class_accuracy(logits: Any, labels: Any) -> Estimate:
    """Share of samples that the classifier takes for the class that was asked for."""
    return estimate(np.asarray(logits).argmax(1) == np.asarray(labels))
