"""The variational bound of a trained model on held-out data, with its standard error.

All steps of the time grid are summed, one draw of x_t each (`diffusion.likelihood`), so that the
only error left is that of the mean over examples and draws.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.diffusion import likelihood
from diffusion_jax.diffusion.denoiser import Denoiser

PyTree = Any
BOUND_STREAM = 3
"""Folded into the seed: training and validation use other numbers (`training.step`)."""
ENUMERABLE = 32
"""Data sets of at most this many different sequences have their floor computed exactly."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BoundEvaluator:
    """Estimates the bound in bits per example.

    Attributes:
        denoiser: `(params, conditioning) -> Denoiser`.
        process: the noising process.
        times: time grid of the bound, from 1 to 0.
        seed: of the draws; fixed, so that two evaluations differ by the weights alone.
        mesh: on which the batches lie.
    """

    denoiser: Callable[[PyTree, Mapping[str, Any]], Denoiser]
    process: Any
    times: np.ndarray
    seed: int
    mesh: Any

    @functools.cached_property
    def _totals(self) -> Callable[..., Any]:
        return jax.jit(self._bits)

    def __call__(self, params: PyTree, batches: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """Mean and standard error over all real examples of padded batches.

        Returns:
            `bound_bits` and `bound_bits_stderr`, bits per example; the bound is on -log2 p.
        """
        count, total, squares = 0.0, 0.0, 0.0
        with jax.set_mesh(self.mesh):
            for number, batch in enumerate(batches):
                sums = self._totals(params, batch, jnp.uint32(number))
                count, total, squares = (
                    a + float(b) for a, b in zip((count, total, squares), sums, strict=True)
                )
        mean = total / count
        variance = max(squares / count - mean**2, 0.0)
        return {"bound_bits": mean, "bound_bits_stderr": math.sqrt(variance / count)}

    def _bits(self, params: PyTree, batch: Any, number: Any) -> tuple[Any, Any, Any]:
        x0, mask = batch["x"], batch["mask"].astype(jnp.float32)
        root = jax.random.fold_in(jax.random.key(self.seed), BOUND_STREAM)
        index = number * len(mask) + jnp.arange(len(mask))
        keys = jax.vmap(lambda i: jax.random.fold_in(root, i))(index)
        denoise = self.denoiser(params, batch.get("conditioning", {}))
        bound = likelihood.variational_bound(denoise, self.process, self.times, x0, key=keys)
        bits = bound.total / math.log(2.0)
        return jnp.sum(mask), jnp.sum(mask * bits), jnp.sum(mask * bits**2)


def floor_bits(sequences: np.ndarray, process: Any, times: np.ndarray) -> float | None:
    """What factorised reverse kernels cost at best, in bits a sequence, above the entropy.

    Args:
        sequences: [N, bits] of a data set with equally likely sequences.
        process: a binomial process.
        times: time grid of the bound.

    Returns:
        the floor, or None where the data cannot be enumerated.
    """
    distinct = np.unique(sequences.reshape(len(sequences), -1), axis=0)
    if len(distinct) > ENUMERABLE:
        return None
    bound = likelihood.factorised_bound(distinct, process, times)
    return bound / math.log(2.0) - math.log2(len(distinct))
