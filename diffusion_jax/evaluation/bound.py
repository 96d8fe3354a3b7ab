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
from diffusion_jax.diffusion.processes import Binomial, Gaussian, with_kernels
from diffusion_jax.diffusion.reverse_entropy import reverse_entropy_bounds
from diffusion_jax.evaluation.shared import batch_keys, filled, on_host
from diffusion_jax.networks import compiler_options
from diffusion_jax.parallel.arrays import gather

PyTree = Any
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
        return jax.jit(self._bits, compiler_options=compiler_options())

    def __call__(self, params: PyTree, batches: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """Mean and standard error over all real examples of padded batches.

        Returns:
            `bound_bits` and, of two examples or more, `bound_bits_stderr`, bits per example; the
            bound is on -log2 p. With `per_dimension` also `bound_bits_per_dim` and its error. For a
            process whose reverse entropies have closed bounds, `reverse_entropy_lower_bits` and
            `..._upper_bits`: of all steps that end in noise, summed. With `sequences` that can be
            enumerated also `bound_floor_bits`.
        """
        found, squares, dimensions = [], [], 1
        with jax.set_mesh(self.mesh):
            for number, batch in enumerate(batches):
                dimensions = math.prod(batch["x"].shape[1:])
                bits, square = gather(self._bits_of(params, batch, jnp.uint32(number)))
                real = gather(batch["mask"])
                found.append(bits[real])
                squares.append(square[real])
            process = on_host(self.process_of(params))
        bound = likelihood.estimate(np.concatenate(found))
        units = {"bound_bits": bound}
        if self.per_dimension:
            units["bound_bits_per_dim"] = bound.scaled(1.0 / dimensions)
        result = {name: unit.value for name, unit in units.items()}
        if bound.n > 1:
            result |= {f"{name}_stderr": unit.standard_error for name, unit in units.items()}
        square = float(np.concatenate(squares).mean(dtype=np.float64))
        return {**result, **self._entropies(process, dimensions, square), **self._floor(process)}

    def _floor(self, process: Any) -> dict[str, float]:
        if self.sequences is None:
            return {}
        floor = floor_bits(self.sequences, process, self.times)
        return {} if floor is None else {"bound_floor_bits": floor}

    def _entropies(self, process: Any, dimensions: int, square: float) -> dict[str, float]:
        """`square`: mean of the squared elements of the data, never below their variance."""
        if not isinstance(process, Gaussian | Binomial):
            return {}
        # The last step is left out: for a density it ends in a point.
        bounds = reverse_entropy_bounds(process, self.times[:-1], variance=square)
        bits = dimensions / math.log(2.0)
        return {
            f"reverse_entropy_{name}_bits": bits * float(np.sum(np.asarray(nats)))
            for name, nats in bounds._asdict().items()
        }

    def _bits(self, params: PyTree, batch: Any, number: Any) -> Any:
        """The bound and the mean of the squared elements, of each example [batch]."""
        x0, offset = batch["x"], 0.0
        keys = batch_keys(self.seed, number, len(x0))
        if self.width is not None:
            # A number that no step of the bound folds in.
            filling = jax.vmap(lambda k: jax.random.fold_in(k, len(self.times)))(keys)
            x0, offset = filled(x0, filling, self.width)
        denoise = self.denoiser(params, batch.get("conditioning", {}))
        process, asked = with_kernels(self.process_of(params), denoise)
        bound = likelihood.variational_bound(asked, process, self.times, x0, key=keys)
        squares = jnp.square(jnp.asarray(x0, jnp.float32)).reshape(len(x0), -1).mean(1)
        return (bound.total + offset) / math.log(2.0), squares


def floor_bits(sequences: np.ndarray, process: Any, times: np.ndarray) -> float | None:
    """What factorised reverse kernels cost at best, in bits a sequence, above the entropy.

    Args:
        sequences: [N, bits] of a data set; one that is there twice is twice as likely.
        process: a binomial process.
        times: time grid of the bound.

    Returns:
        the floor, or None where the data or their noisy states are too many to be enumerated.
    """
    flat = np.asarray(sequences, np.float64).reshape(len(sequences), -1)
    distinct, counts = np.unique(flat, axis=0, return_counts=True)
    many = likelihood.noisy_states(distinct) > likelihood.MOST_STATES
    if len(distinct) > ENUMERABLE or many:
        return None
    chances = counts / counts.sum()
    bound = likelihood.factorised_bound(distinct, on_host(process), times, chances)
    return bound / math.log(2.0) + float(chances @ np.log2(chances))
