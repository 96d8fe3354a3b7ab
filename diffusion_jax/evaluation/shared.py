"""What the bounds of training and of `bits_per_dim` have in common."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from diffusion_jax.diffusion import likelihood
from diffusion_jax.parallel.arrays import gather

BOUND_STREAM = 3
"""Folded into the seed: training and validation use other numbers (`training.step`)."""


def batch_keys(seed: int, number: Any, size: int) -> Array:
    """[size] keys of the examples of batch `number`, by their place in the data."""
    root = jax.random.fold_in(jax.random.key(seed), BOUND_STREAM)
    index = number * size + jnp.arange(size)
    return jax.vmap(lambda i: jax.random.fold_in(root, i))(index)


def filled(x0: Any, keys: Array, width: float) -> tuple[Any, float]:
    """`x0` with noise in the cell of each value, and the nats that this adds to a density's."""
    cells = likelihood.cell_nats(x0[0].size, width)
    return likelihood.dequantise(x0, keys, width), cells


def on_host(process: Any) -> Any:
    """The process with constants, NumPy float64, in place of what it learned.

    A collective where several hosts hold a part of it.
    """
    for name in ("schedule", "keep"):
        part = getattr(process, name, None)
        if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(part)):
            constant = jax.tree.map(lambda a: np.asarray(a, np.float64), gather(part))
            process = dataclasses.replace(process, **{name: constant})
    return process
