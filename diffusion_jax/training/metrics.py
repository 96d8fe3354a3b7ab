"""Metrics on their way from the device to the log: packed, read back late, summed on the host."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion_jax.training.step import StepMetrics


def metric_names(metrics: StepMetrics) -> tuple[str, ...]:
    """The order in which `pack` lays scalars out."""
    return tuple(sorted(metrics.scalars))


def pack(metrics: StepMetrics) -> Float[Array, "names 2"]:
    """All (sum, count) pairs in one array: one buffer to read back a step instead of dozens."""
    return jnp.stack(
        [
            jnp.stack([jnp.asarray(part, jnp.float32) for part in metrics.scalars[name]])
            for name in metric_names(metrics)
        ]
    )


class SkippedStep(NamedTuple):
    """A step whose update was not finite."""

    step: int
    bad_examples: np.ndarray


class _Pending(NamedTuple):
    step: int
    packed: jax.Array
    bad_examples: jax.Array


@dataclasses.dataclass
class MetricBuffer:
    """Sums metrics between two log lines without waiting for the step just dispatched.

    Attributes:
        names: scalar names in packed order.
        delay: steps that may be in flight; the host never runs further ahead than this.
    """

    names: Sequence[str]
    delay: int = 2

    def __post_init__(self) -> None:
        self._pending: collections.deque[_Pending] = collections.deque()
        self._totals = np.zeros((len(self.names), 2))
        self._skipped: list[SkippedStep] = []
        self.consecutive_skips = 0
        self.longest_skips = 0

    def push(self, step: int, packed: jax.Array, bad_examples: jax.Array) -> None:
        """Takes the metrics of update number `step` and reads back those that are old enough."""
        packed.copy_to_host_async()
        self._pending.append(_Pending(step, packed, bad_examples))
        while len(self._pending) > self.delay:
            self._read(self._pending.popleft())

    def flush(self) -> None:
        """Reads back everything: waits for the last dispatched step."""
        while self._pending:
            self._read(self._pending.popleft())

    def take(self) -> dict[str, float]:
        """Means since the last call, over what has been read back; empty bins are left out."""
        sums, counts = self._totals.T
        means = {
            name: float(total / count)
            for name, total, count in zip(self.names, sums, counts, strict=True)
            if count > 0
        }
        self._totals[:] = 0.0
        return means

    def take_skipped(self) -> list[SkippedStep]:
        """Steps found to be skipped since the last call."""
        found, self._skipped = self._skipped, []
        return found

    def _read(self, item: _Pending) -> None:
        values = np.asarray(item.packed, np.float64)
        self._totals += values
        if values[list(self.names).index("skipped"), 0] > 0:
            self.consecutive_skips += 1
            self.longest_skips = max(self.longest_skips, self.consecutive_skips)
            self._skipped.append(SkippedStep(item.step, np.asarray(item.bad_examples)))
        else:
            self.consecutive_skips = 0


def means(pairs: Mapping[str, tuple[Any, Any]]) -> dict[str, float]:
    """(sum, count) pairs as floats; those without a count are left out."""
    result = {}
    for name, (total, count) in pairs.items():
        if float(count) > 0:
            result[name] = float(total) / float(count)
    return result
