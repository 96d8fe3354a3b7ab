"""Validation loss on held-out examples at fixed noise, for raw and averaged weights."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Float64

from diffusion_jax.networks import compiler_options
from diffusion_jax.parallel.arrays import gather
from diffusion_jax.training.metrics import means
from diffusion_jax.training.state import TrainState
from diffusion_jax.training.step import VALIDATION_STREAM, Trainer

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Validator:
    """Evaluates the objective on the same examples with the same noise every time.

    Two curves of one run then differ by the weights alone, and noise levels are stratified over
    the whole held-out set.

    Attributes:
        trainer: for the objective and the key of the validation stream.
        batches: callable that yields device batches of one shape, padded with `mask`.
        count: held-out examples in all of them.
        mesh: the mesh on which the batches lie.
    """

    trainer: Trainer
    batches: Callable[[], Iterable[Mapping[str, Any]]]
    count: int
    mesh: Any

    @functools.cached_property
    def _evaluate(self) -> Callable[..., Any]:
        return jax.jit(self._metrics, compiler_options=compiler_options())

    @functools.cached_property
    def _evaluate_each(self) -> Callable[..., Any]:
        return jax.jit(self._each, compiler_options=compiler_options())

    def __call__(self, state: TrainState, frozen: Mapping[str, PyTree]) -> dict[str, float]:
        """Means over the held-out examples.

        Returns:
            `val/<metric>` for the raw weights, `val/<metric>_ema` for the average called
            "default" and `val/<metric>_ema_<name>` for the others.
        """
        weights = {"": state.params}
        for name, tree in state.ema.items():
            weights["_ema" if name == "default" else f"_ema_{name}"] = tree
        totals: dict[str, dict[str, Any]] = {suffix: {} for suffix in weights}
        with jax.set_mesh(self.mesh):
            for batch, place in self._placed():
                for suffix, params in weights.items():
                    pairs = self._evaluate(params, state, frozen, batch, *place)
                    _add(totals[suffix], pairs)
        result: dict[str, float] = {}
        for suffix, pairs in totals.items():
            result.update({f"val/{k}{suffix}": v for k, v in means(pairs).items()})
        return result

    def examples(
        self, params: PyTree, state: TrainState, frozen: Mapping[str, PyTree]
    ) -> dict[str, Float64[np.ndarray, "count 2"]]:
        """The metrics of each held-out example by itself, with the noise that it has in the means.

        Args:
            params: the weights to be judged.
            state: whose step and extra the objective may read.
            frozen: trees that are never trained.

        Returns:
            by metric the (sum, count) of every example, the same in every process; the count is 0
            where an example has no part in it, such as a bin of another noise level.
        """
        found: dict[str, list[np.ndarray]] = {}
        with jax.set_mesh(self.mesh):
            for batch, place in self._placed():
                pairs = gather(self._evaluate_each(params, state, frozen, batch, *place))
                real = gather(batch["mask"])
                for name, pair in pairs.items():
                    found.setdefault(name, []).append(np.stack(pair, axis=1)[real])
        return {name: np.concatenate(parts).astype(np.float64) for name, parts in found.items()}

    def _placed(self) -> Iterator[tuple[Mapping[str, Any], tuple[Any, Any]]]:
        """Batches, each with the place of its first example and the cells of all of them."""
        for number, batch in enumerate(self.batches()):
            size = batch["mask"].shape[0]
            yield batch, (jnp.int32(number * size), cells(number * size, size, self.count))

    def _metrics(
        self,
        params: PyTree,
        state: TrainState,
        frozen: PyTree,
        batch: Any,
        first: Any,
        stratum: Any,
    ) -> Mapping[str, tuple[Any, Any]]:
        keys = self._keys(first, batch["mask"].shape[0])
        return self.trainer.evaluate(params, state, frozen, batch, keys, stratum, self.count)

    def _each(
        self,
        params: PyTree,
        state: TrainState,
        frozen: PyTree,
        batch: Any,
        first: Any,
        stratum: Any,
    ) -> Mapping[str, tuple[Any, Any]]:
        def alone(*example: Any) -> Mapping[str, tuple[Any, Any]]:
            one, keys, cell = jax.tree.map(lambda a: a[None], example)
            return self.trainer.evaluate(params, state, frozen, one, keys, cell, self.count)

        # A metric is a sum over a batch, so that an example is judged alone by a batch of it.
        return jax.vmap(alone)(batch, self._keys(first, batch["mask"].shape[0]), stratum)

    def _keys(self, first: Any, size: int) -> Any:
        key = self.trainer.key(VALIDATION_STREAM)
        return jax.vmap(lambda i: jax.random.fold_in(key, i))(first + jnp.arange(size))


def cells(first: int, size: int, count: int) -> Float32[np.ndarray, " size"]:
    """Where the cells of examples first, first + 1, ... begin, of `count` that share out [0, 1).

    Each of the first `count` examples has a cell of its own, so that a mean over them all is
    unbiased. Neighbours are apart by about the golden section: unlike index / count, that does not
    tie an example's place in the set to its noise level.
    """
    golden = round(0.6180339887 * count)
    # Coprime to the count: a stride that meets every cell before it comes back to the first.
    stride = next(
        s for d in range(count + 1) for s in (golden + d, golden - d) if math.gcd(s, count) == 1
    )
    return np.asarray((first + np.arange(size)) * stride % count / count, np.float32)


def _add(totals: dict[str, Any], pairs: Mapping[str, tuple[Any, Any]]) -> None:
    for name, (total, count) in pairs.items():
        before = totals.get(name, (0.0, 0.0))
        totals[name] = (before[0] + float(total), before[1] + float(count))
