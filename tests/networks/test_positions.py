"""Rotary positions: products know offsets alone, lengths stay, any number of axes."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from quick import run

from diffusion_jax.errors import ConfigError
from diffusion_jax.networks import positions


def turned(grid, head_dim, vector):
    """One vector of a head, standing at every position of a grid."""
    angles = positions.axial_angles(grid, head_dim)
    wide = np.broadcast_to(vector, (1, len(angles), 1, head_dim))
    out = run(lambda wide: positions.rotate(wide, angles), wide)
    return np.asarray(out)[0, :, 0].reshape(*grid, head_dim)


@pytest.mark.parametrize(
    ("grid", "offset"), [((7,), (2,)), ((4, 5), (1, 2)), ((4, 5), (-1, 2)), ((3, 4, 5), (1, -1, 2))]
)
def test_products_depend_on_the_offset_alone(grid, offset):
    q, k = np.random.default_rng(0).normal(size=(2, 16)).astype(np.float32)
    queries, keys = turned(grid, 16, q), turned(grid, 16, k)
    products = []
    for place in np.ndindex(*grid):
        other = tuple(np.add(place, offset))
        if all(0 <= i < size for i, size in zip(other, grid, strict=True)):
            products.append(queries[place] @ keys[other])
    assert len(products) >= 5
    np.testing.assert_allclose(products, products[0], atol=1e-4)
    assert abs(products[0] - q @ k) > 1e-2


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_every_axis_is_told_apart(axis):
    keys = turned((3, 4, 5), 16, np.ones(16, np.float32))
    along = np.moveaxis(keys, axis, 0).reshape(keys.shape[axis], -1)
    assert len(np.unique(along.round(4), axis=0)) == keys.shape[axis]


def test_turning_is_a_rotation_and_the_rest_stays():
    x = np.random.default_rng(0).normal(size=(2, 12, 3, 14)).astype(np.float32)
    angles = positions.axial_angles((4, 3), 14)
    assert angles.shape == (12, 6)  # 14 entries: 3 pairs for each of 2 axes, 2 over
    out = np.asarray(run(lambda x: positions.rotate(x, angles), x))
    np.testing.assert_allclose(np.linalg.norm(out, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5)
    np.testing.assert_array_equal(out[..., 12:], x[..., 12:])
    np.testing.assert_array_equal(out[:, 0], x[:, 0])
    # Highest frequency: one radian a step along the last axis.
    np.testing.assert_allclose(angles[1, 3], 1.0)


def test_tokens_without_a_place_are_not_turned():
    angles = positions.axial_angles((2, 2), 8, before=3)
    np.testing.assert_array_equal(angles[:3], 0)
    np.testing.assert_array_equal(angles[3:], positions.axial_angles((2, 2), 8))


def test_rotation_in_half_precision_turns_in_float32():
    x = jnp.ones((1, 300, 1, 8), jnp.bfloat16)
    angles = positions.axial_angles((300,), 8)
    out, exact = run(
        lambda x: (positions.rotate(x, angles), positions.rotate(x.astype(jnp.float32), angles)), x
    )
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(out), exact, atol=0.01)


def test_heads_too_small_for_the_axes_are_refused():
    positions.check_rotary("network.dit.heads", 24, 6, axes=2)
    with pytest.raises(ConfigError, match=r"network\.dit\.heads=12: heads of 2 .* at most 6 heads"):
        positions.check_rotary("network.dit.heads", 24, 12, axes=2)
