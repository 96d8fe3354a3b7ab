"""Letters of a Markov chain: a language whose entropy is known, made at run time.

Every letter is followed by few others, so that there is much to learn, and no model can be better
than the entropy in closed form (Shannon 1948, section 7):

    H(x_1 .. x_L) = H(p) + (L - 1) sum_i p_i H(P_i),      p the stationary distribution of P.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64

from diffusion_jax.data.arrays import ArraySource
from diffusion_jax.data.spec import DataSpec, Split
from diffusion_jax.data.text_file import LETTERS
from diffusion_jax.errors import ConfigError

CONCENTRATION = 0.1
"""Of the Dirichlet distribution of the rows of P; below 1, a few successors have most chance."""


def markov(
    split: Split,
    *,
    states: int = 27,
    length: int = 64,
    size: int = 20_000,
    held_out: int = 1_000,
    seed: int = 0,
) -> ArraySource:
    """Sequences of `length` tokens of a stationary chain; ids run through both splits.

    Args:
      split: "train" or "validation"; both draw from the same chain.
      states: letters, 2 to 27, the first being the space.
      length: tokens of a sequence.
      size: sequences to train on.
      held_out: sequences for validation.
      seed: of the chain and of the draws.

    Raises:
      ConfigError: an option out of range.
    """
    if not 2 <= states <= len(LETTERS):
        raise ConfigError(f"data.markov.states={states}: expected 2 to {len(LETTERS)}")
    for field, value in (("length", length), ("size", size), ("held_out", held_out)):
        if value < 1:
            raise ConfigError(f"data.markov.{field}={value}: expected at least 1")
    first, count = (0, size) if split == "train" else (size, held_out)
    matrix = transitions(states, seed)
    # Rows of the uniform numbers are examples: a longer set begins with the shorter one.
    u = np.random.default_rng([seed, 1 + (split != "train")]).random((count, length))
    x = np.empty((count, length), np.int32)
    chance = np.tile(stationary(matrix), (count, 1))
    for place in range(length):
        passed = np.cumsum(chance, axis=1) > u[:, place, None]
        passed[:, -1] = True
        x[:, place] = passed.argmax(1)
        chance = matrix[x[:, place]]
    characters = LETTERS[:states]
    spec = DataSpec(
        shape=(length,),
        kind="tokens",
        vocabulary=states,
        characters=characters,
        range=(0.0, states - 1.0),
    )
    ids = np.arange(first, first + count, dtype=np.int64)
    return ArraySource(spec=spec, x=x, example_ids=ids)


def transitions(states: int = 27, seed: int = 0) -> Float64[np.ndarray, "states states"]:
    """P[i, j], the chance that j follows i: rows of a Dirichlet distribution, mixed with 1% of
    equal chance, so that the chain reaches every state."""
    rows = np.random.default_rng([seed, 0]).dirichlet(np.full(states, CONCENTRATION), states)
    return 0.99 * rows + 0.01 / states


def stationary(
    matrix: Float64[np.ndarray, "states states"],
) -> Float64[np.ndarray, " states"]:
    """The distribution p with p P = p."""
    states = len(matrix)
    equations = np.vstack([matrix.T - np.eye(states), np.ones(states)])
    return np.linalg.lstsq(equations, np.append(np.zeros(states), 1.0), rcond=None)[0]


def entropy_bits(matrix: Float64[np.ndarray, "states states"], length: int) -> float:
    """Entropy of a stationary sequence of `length` tokens, in bits: the floor of any bound."""
    p = stationary(matrix)
    rate = float(p @ _bits(matrix).sum(1))
    return float(_bits(p).sum()) + (length - 1) * rate


def _bits(p: np.ndarray) -> np.ndarray:
    return -p * np.log2(np.where(p > 0.0, p, 1.0))
