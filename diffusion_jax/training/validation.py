"""Validation loss on held-out examples at fixed noise, for raw and averaged weights."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from diffusion_jax.networks import compiler_options
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
            for number, batch in enumerate(self.batches()):
                size = batch["mask"].shape[0]
                place = jnp.int32(number * size), cells(number * size, size, self.count)
                for suffix, params in weights.items():
                    pairs = self._evaluate(params, state, frozen, batch, *place)
                    _add(totals[suffix], pairs)
        result: dict[str, float] = {}
        for suffix, pairs in totals.items():
            result.update({f"val/{k}{suffix}": v for k, v in means(pairs).items()})
        return result

    def _metrics(
        self,
        params: PyTree,
        state: TrainState,
        frozen: PyTree,
        batch: Any,
        first: Any,
        stratum: Any,
    ) -> Mapping[str, tuple[Any, Any]]:
        index = first + jnp.arange(batch["mask"].shape[0])
        key = self.trainer.key(VALIDATION_STREAM)
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
        return self.trainer.evaluate(params, state, frozen, batch, keys, stratum, self.count)


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
