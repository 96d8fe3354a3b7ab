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
from diffusion_jax.diffusion.processes import Binomial, Gaussian, LearnedKeep, with_kernels
from diffusion_jax.diffusion.reverse_entropy import reverse_entropy_bounds
from diffusion_jax.parallel.arrays import gather

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
        process_of: `params -> process`, the noising process, which may be learned.
        times: time grid of the bound, from 1 to 0.
        seed: of the draws; fixed, so that two evaluations differ by the weights alone.
        mesh: on which the batches lie.
        width: distance of the values of discrete data: noise fills it, and the bound is that on
            their probability. None: it is that of the process, a density's if that is Gaussian.
        per_dimension: also give bits per dimension.
        sequences: of bits, [N, bits], all those that the data hold: gives the floor.
    """

    denoiser: Callable[[PyTree, Mapping[str, Any]], Denoiser]
    process_of: Callable[[PyTree], Any]
    times: np.ndarray
    seed: int
    mesh: Any
    width: float | None = None
    per_dimension: bool = False
    sequences: np.ndarray | None = None

    @functools.cached_property
    def _bits_of(self) -> Callable[..., Any]:
        return jax.jit(self._bits)

    def __call__(self, params: PyTree, batches: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """Mean and standard error over all real examples of padded batches.

        Returns:
            `bound_bits` and, of two examples or more, `bound_bits_stderr`, bits per example; the
            bound is on -log2 p. With `per_dimension` also `bound_bits_per_dim`. For a process whose
            reverse entropies have closed bounds, `reverse_entropy_lower_bits` and `..._upper_bits`:
            of all steps that end in noise, summed. With `sequences` that can be enumerated also
            `bound_floor_bits`.
        """
        found, dimensions = [], 1
        with jax.set_mesh(self.mesh):
            for number, batch in enumerate(batches):
                dimensions = math.prod(batch["x"].shape[1:])
                bits = gather(self._bits_of(params, batch, jnp.uint32(number)))
                found.append(bits[gather(batch["mask"])])
        bound = likelihood.estimate(np.concatenate(found))
        result = {"bound_bits": bound.value}
        if bound.n > 1:
            result["bound_bits_stderr"] = bound.standard_error
        if self.per_dimension:
            result["bound_bits_per_dim"] = bound.value / dimensions
        process = self.process_of(params)
        return {**result, **self._entropies(process, dimensions), **self._floor(process)}

    def _floor(self, process: Any) -> dict[str, float]:
        if self.sequences is None:
            return {}
        floor = floor_bits(self.sequences, process, self.times)
        return {} if floor is None else {"bound_floor_bits": floor}

    def _entropies(self, process: Any, dimensions: int) -> dict[str, float]:
        if not isinstance(process, Gaussian | Binomial):
            return {}
        # The last step is left out: for a density it ends in a point.
        bounds = reverse_entropy_bounds(process, self.times[:-1])
        bits = dimensions / math.log(2.0)
        return {
            f"reverse_entropy_{name}_bits": bits * float(np.sum(np.asarray(nats)))
            for name, nats in bounds._asdict().items()
        }

    def _bits(self, params: PyTree, batch: Any, number: Any) -> Any:
        x0 = batch["x"]
        root = jax.random.fold_in(jax.random.key(self.seed), BOUND_STREAM)
        index = number * len(x0) + jnp.arange(len(x0))
        keys = jax.vmap(lambda i: jax.random.fold_in(root, i))(index)
        offset = 0.0
        if self.width is not None:
            # A number that no step of the bound folds in.
            filling = jax.vmap(lambda k: jax.random.fold_in(k, len(self.times)))(keys)
            x0 = likelihood.dequantise(x0, filling, self.width)
            offset = -math.prod(x0.shape[1:]) * math.log(self.width)
        denoise = self.denoiser(params, batch.get("conditioning", {}))
        process, asked = with_kernels(self.process_of(params), denoise)
        bound = likelihood.variational_bound(asked, process, self.times, x0, key=keys)
        return (bound.total + offset) / math.log(2.0)


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
    if isinstance(process.keep, LearnedKeep):
        logits = np.asarray(process.keep.logits, np.float64)
        process = dataclasses.replace(process, keep=LearnedKeep(logits))
    bound = likelihood.factorised_bound(distinct, process, times)
    return bound / math.log(2.0) - math.log2(len(distinct))
