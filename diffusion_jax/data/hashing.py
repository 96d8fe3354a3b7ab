"""Counter-based randomness: a draw is a pure function of integers, on any machine, for ever.

NumPy does not promise that its generators give the same stream in a later release, and a resumed
run must meet the same examples whatever was upgraded meanwhile. So the order of examples, the
augmentations and the synthetic data come from the SplitMix64 finaliser (Steele, Lea and Flood,
"Fast splittable pseudorandom number generators", OOPSLA 2014), applied to the words of a counter.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64, UInt64

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_MASK = (1 << 64) - 1


def finalise(words: UInt64[np.ndarray, " *shape"]) -> UInt64[np.ndarray, " *shape"]:
    """SplitMix64's output function: a bijection of the 64-bit words that scatters their bits."""
    words = (words ^ (words >> np.uint64(30))) * _MULTIPLIERS[0]
    words = (words ^ (words >> np.uint64(27))) * _MULTIPLIERS[1]
    return words ^ (words >> np.uint64(31))


def _as_words(value: int | np.integer | np.ndarray) -> UInt64[np.ndarray, " *shape"]:
    if isinstance(value, np.ndarray):
        return np.atleast_1d(value).astype(np.uint64)
    # Arrays wrap around silently where scalars warn; a Python int may also be negative or long.
    return np.array([int(value) & _MASK], np.uint64)


def mix(*words: int | np.integer | np.ndarray) -> UInt64[np.ndarray, " *shape"]:
    """A 64-bit hash of the sequence `words`, element by element over broadcast arrays.

    Args:
      *words: integers or integer arrays of shapes that broadcast together. Their order matters.

    Returns:
      uint64 array of the broadcast shape, at least one-dimensional.
    """
    state = np.zeros(1, np.uint64)
    for word in words:
        state = finalise((state ^ _as_words(word)) + _GOLDEN)
    return state


def uniform(*words: int | np.integer | np.ndarray) -> Float64[np.ndarray, " *shape"]:
    """Uniform draws in the open interval (0, 1), one for each hash of `words`."""
    # 52 bits and a half step: neither 0 nor 1 can come out, so logarithms stay finite.
    return ((mix(*words) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def normal(*words: int | np.integer | np.ndarray) -> Float64[np.ndarray, " *shape"]:
    """Standard normal draws, one for each hash of `words` (Box and Muller, 1958)."""
    radius = np.sqrt(-2.0 * np.log(uniform(*words, 0)))
    return radius * np.cos(2.0 * np.pi * uniform(*words, 1))
