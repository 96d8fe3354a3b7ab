"""A bound on the probability of discrete data by that on the density of a continuous model.

With values at distances w and u uniform in the cube of side w around each (Theis et al. 2016),

    -log P(x0) <= E_u [-log p(x0 + u)] - D log w                                           (1)

so that an objective that bounds -log p(x0 + u) bounds -log P(x0) with a constant added; 2015's
image models add such noise to keep the density from growing without limit on the few values that
pixels have. Every example draws a u of its own at each visit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from diffusion_jax.diffusion import likelihood
from diffusion_jax.objectives.base import Aux, Batch, Context
from diffusion_jax.objectives.denoising import split_keys

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Dequantised:
    """(1) of an objective in bits per dimension, with its metrics `loss` and `bits_per_example`.

    Attributes:
        inner: the objective, in bits per dimension of a density. Where its metrics have the term
            `reconstruction`, that is the one which the constant belongs to.
        width: w.
    """

    inner: Callable[..., tuple[Any, Aux]]
    width: float

    def __call__(
        self, params: PyTree, batch: Batch, key: Key[Array, " batch"], context: Context
    ) -> tuple[Float[Array, ""], Aux]:
        own, rest = split_keys(key, 2)
        x = likelihood.dequantise(batch["x"], own, self.width)
        loss, aux = self.inner(params, {**batch, "x": x}, rest, context)
        dimensions = math.prod(x.shape[1:])
        whole = likelihood.cell_nats(dimensions, self.width) / math.log(2.0)
        offset = whole / dimensions
        metrics = dict(aux.metrics)
        offsets = {"loss": offset, "reconstruction": offset, "bits_per_example": whole}
        for name in offsets.keys() & metrics.keys():
            total, count = metrics[name]
            metrics[name] = (total + count * offsets[name], count)
        example = aux.example_loss
        example = None if example is None else example + offset
        return jnp.asarray(loss + offset), Aux(metrics, aux.extra, example)
