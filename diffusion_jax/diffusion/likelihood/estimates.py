"""Means with their standard errors, and their units."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.diffusion.broadcasting import Count, Number
from diffusion_jax.errors import ConfigError


class Estimate(NamedTuple):
    """A mean of independent values.

    Attributes:
        value: the mean.
        standard_error: of the mean; infinite where one value alone was seen.
        n: how many values.
    """

    value: float
    standard_error: float
    n: int

    def scaled(self, factor: Number) -> Estimate:
        """The same in another unit: of `factor` times the values."""
        factor = float(factor)
        return Estimate(factor * self.value, abs(factor) * self.standard_error, self.n)

    def shifted(self, offset: Number) -> Estimate:
        """The same of the values plus a known number."""
        return self._replace(value=self.value + float(offset))


def estimate(values: Any) -> Estimate:
    """Mean of independent `values` [n], NumPy or JAX, summed in float64.

    One value an example: of several draws of an example the mean, which is one value.

    Raises:
      ValueError: no values, or of more than one axis.
    """
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not array.size:
        raise ConfigError(f"values has shape {array.shape}; expected [n] with n >= 1")
    n = array.size
    error = float(array.std(ddof=1)) / math.sqrt(n) if n > 1 else math.inf
    return Estimate(float(array.mean()), error, n)


def bits_per_dim(nats: Estimate, dimensions: Count) -> Estimate:
    """-log p per example, in nats, as bits per dimension: divided by `dimensions` log 2.

    Raises:
      ValueError: fewer than one dimension.
    """
    if dimensions < 1:
        raise ConfigError(f"dimensions={dimensions}; expected at least 1")
    return nats.scaled(1.0 / (int(dimensions) * math.log(2.0)))
