"""Binary heartbeat: a one in every fifth place, at one of five phases.

Source: Sohl-Dickstein et al., "Deep unsupervised learning using nonequilibrium thermodynamics",
ICML 2015, section 3.1. Each sequence has probability 1/5: the best log-likelihood is log2(1/5).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32

from diffusion_jax.data.arrays import ArraySource
from diffusion_jax.data.spec import DataSpec, Split
from diffusion_jax.errors import ConfigError

PERIOD = 5


def heartbeat_sequences(length: int = 20) -> Float32[np.ndarray, "5 length"]:
    """The five sequences the data set consists of; row p has ones at places p, p + 5, ..."""
    places, phases = np.arange(length), np.arange(PERIOD)
    return (places[None, :] % PERIOD == phases[:, None]).astype(np.float32)


def heartbeat(
    split: Split, *, length: int = 20, size: int = 10_000, held_out: int = 1_000
) -> ArraySource:
    """Sequences of `length` bits as 0.0 and 1.0; example i, with id i, has phase i mod 5.

    Ids 0..size-1 are for training, the next `held_out` for validation. There are only five
    different sequences, so the two splits differ in their ids, not in their values.

    Raises:
      ConfigError: a length below 5 (a phase would have no one), or an empty split.
    """
    if length < PERIOD:
        raise ConfigError(f"data.heartbeat.length={length}: expected at least {PERIOD}")
    first, count = (0, size) if split == "train" else (size, held_out)
    field = "size" if split == "train" else "held_out"
    if count < 1:
        raise ConfigError(f"data.heartbeat.{field}={count}: expected at least 1")
    ids = np.arange(first, first + count, dtype=np.int64)
    spec = DataSpec(shape=(length,), kind="bits", range=(0.0, 1.0))
    return ArraySource(spec=spec, x=heartbeat_sequences(length)[ids % PERIOD], example_ids=ids)
