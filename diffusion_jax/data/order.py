"""The order of examples: a permutation for each epoch, read at any place without building it.

Long data sets are permuted by a keyed Feistel network on the integers below the next power of two;
walking its cycles brings every value back below n (Black and Rogaway, "Ciphers with arbitrary
finite domains", CT-RSA 2002). Nothing has to be computed when an epoch begins, and the order of a
billion examples needs no more memory than that of ten thousand. On a few elements such a network
reaches some orders more often than others, so short data sets are sorted by a hash instead.
"""

from __future__ import annotations

import functools

import numpy as np
from jaxtyping import Int64

from diffusion_jax.data.hashing import finalise, mix

_ROUNDS = 8
# Positions are computed a block at a time because NumPy's cost at 100 elements is all overhead.
# Data sets up to this length are sorted: that takes at most three blocks' worth of hashes.
_BLOCK = 8192


def shuffled_indices(start: int, count: int, length: int, seed: int) -> Int64[np.ndarray, " count"]:
    """The examples at `count` positions from `start` of an endless run over shuffled examples.

    Position q belongs to epoch q // length, and within an epoch every index occurs once.

    Args:
      start: first position, in examples since the start of the run.
      count: number of positions.
      length: number of examples in the data set, at least 1.
      seed: chooses the permutations of all epochs.

    Returns:
      int64 [count] indices in [0, length).
    """
    first = start // _BLOCK
    last = (start + count - 1) // _BLOCK
    blocks = [_block(number, length, seed) for number in range(first, last + 1)]
    offset = start - first * _BLOCK
    return np.concatenate(blocks)[offset : offset + count]


@functools.lru_cache(maxsize=8)
def _block(number: int, length: int, seed: int) -> Int64[np.ndarray, " block"]:
    positions = number * _BLOCK + np.arange(_BLOCK, dtype=np.int64)
    epochs, places = np.divmod(positions, np.int64(length))
    if length > _BLOCK:
        return _feistel(places, epochs, length, seed)
    first = int(epochs[0])
    wanted = np.arange(first, int(epochs[-1]) + 1, dtype=np.int64)
    hashes = mix(seed, wanted[:, None], np.arange(length)[None, :])
    return np.argsort(hashes, axis=1, kind="stable")[epochs - first, places]


def _feistel(
    places: Int64[np.ndarray, " n"], epochs: Int64[np.ndarray, " n"], length: int, seed: int
) -> Int64[np.ndarray, " n"]:
    bits = (length - 1).bit_length()
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    keys = [mix(seed, step, epochs) for step in range(_ROUNDS)]

    values = places.astype(np.uint64)
    pending = np.arange(values.size)
    while pending.size:
        low, high = values[pending] & low_mask, values[pending] >> low_bits
        for even, odd in zip(keys[::2], keys[1::2], strict=True):
            low ^= finalise(high + even[pending]) & low_mask
            high ^= finalise(low + odd[pending]) & high_mask
        values[pending] = (high << low_bits) | low
        pending = pending[values[pending] >= np.uint64(length)]
    return values.astype(np.int64)
