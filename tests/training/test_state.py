"""Positions beyond 32 bits, and keys that depend on them alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.training.state import advance, example_keys, position, position_words


@pytest.mark.parametrize("start", [0, 5, 2**32 - 3, 2**32, 7 * 2**32 - 1, 2**40 + 17])
def test_counter_carries(start):
    words = jnp.asarray(position_words(start))
    for count in (1, 3, 128):
        assert position(advance(words, count)) == start + count


def test_keys_follow_the_position_not_the_batch():
    key = jax.random.key(3)
    start = 2**32 - 6
    whole = jax.random.key_data(example_keys(key, jnp.asarray(position_words(start)), 12))
    later = jax.random.key_data(example_keys(key, jnp.asarray(position_words(start + 4)), 8))
    np.testing.assert_array_equal(whole[4:], later)
    assert len({tuple(row) for row in np.asarray(whole)}) == 12
