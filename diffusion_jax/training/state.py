"""The whole truth of a run: one plain pytree, to which seed and config add everything else.

No iterator and no random number generator hides elsewhere: the batch of a step is a function of
`(seed, examples seen)`, and so is every random key.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, UInt32

PyTree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """State of training. Fields are typed Any since they also hold shapes and shardings.

    Attributes:
        step: int32 scalar, updates made so far (skipped ones included).
        examples: uint32 [2], (high, low) words of the number of examples seen so far. Kept beside
            `step` so that a changed batch size goes on where the run was.
        params: nested dict of float32 arrays.
        opt_state: `{"optimizer": ..., "guard": {"skipped", "consecutive"}}`.
        ema: `{name: tree like params}`.
        extra: the objective's own state.
    """

    step: Any
    examples: Any
    params: PyTree
    opt_state: PyTree
    ema: PyTree
    extra: PyTree


def position_words(position: int) -> np.ndarray:
    """Splits a number of examples into (high, low) uint32 words."""
    return np.array([position >> 32, position & 0xFFFFFFFF], np.uint32)


def position(examples: Any) -> int:
    """The Python int held by the words of `TrainState.examples`."""
    high, low = (int(word) for word in np.asarray(examples))
    return (high << 32) + low


def advance(examples: UInt32[Array, "2"], count: Any) -> UInt32[Array, "2 ..."]:
    """Adds `count` (uint32, any shape) to a two-word counter, with carry.

    Returns:
        words of shape [2, *count.shape].
    """
    count = jnp.asarray(count, jnp.uint32)
    low = examples[1] + count
    high = examples[0] + (low < count).astype(jnp.uint32)
    return jnp.stack([jnp.broadcast_to(high, low.shape), low])


def example_keys(
    key: Key[Array, ""], examples: UInt32[Array, "2"], batch_size: int
) -> Key[Array, " batch"]:
    """One key per example of the next batch, from the example's global position.

    The position, not the place in a micro-batch or on a device, decides: accumulation or another
    topology changes no noise.
    """
    high, low = advance(examples, jnp.arange(batch_size, dtype=jnp.uint32))
    return jax.vmap(lambda h, low: jax.random.fold_in(jax.random.fold_in(key, h), low))(high, low)


def strata(batch_size: int) -> Float[Array, " batch"]:
    """[B] place of each example in the global batch, as a fraction in [0, 1)."""
    return jnp.arange(batch_size, dtype=jnp.float32) / batch_size
