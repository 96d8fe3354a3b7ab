"""Bilinear resizing against lines, which it keeps, and against Pillow."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffusion_jax.evaluation.features.bilinear import antialiased, bilinear


@pytest.mark.parametrize("lengths", [(8, 32), (32, 8), (48, 64), (299, 224)])
@pytest.mark.parametrize("size", [20, 299])
def test_a_line_is_read_where_each_convention_says(lengths, size):
    height, width = lengths
    y, x = np.mgrid[:height, :width].astype(np.float32)
    picture = jnp.stack([x, y], -1)[None]
    at = np.arange(size)
    half = np.asarray(bilinear(picture, size, half_pixel=True))[0]
    corner = np.asarray(bilinear(picture, size, half_pixel=False))[0]
    for channel, length in enumerate((width, height)):
        centres = np.clip((at + 0.5) * length / size - 0.5, 0, length - 1)
        corners = np.minimum(at * length / size, length - 1)
        for found, expected in ((half, centres), (corner, corners)):
            along = found[..., channel] if channel == 0 else found[..., channel].T
            np.testing.assert_allclose(along, np.tile(expected, (size, 1)), atol=5e-5)


def test_only_two_pixels_are_read_a_side():
    picture = jnp.zeros((1, 8, 8, 1)).at[0, 1, 1].set(1.0)
    # From 8 to 2, output 0 reads at 3/2: halves of pixels 1 and 2 along each side.
    np.testing.assert_allclose(bilinear(picture, 2, half_pixel=True)[0, 0, 0, 0], 0.25)
    np.testing.assert_allclose(bilinear(picture, 2, half_pixel=False)[0, :, :, 0], 0.0)


@pytest.mark.parametrize("lengths", [(30, 41), (300, 229), (224, 224)])
def test_antialiased_is_pillows(lengths):
    picture = np.random.default_rng(0).random(lengths, dtype=np.float32)
    expected = Image.fromarray(picture).resize((224, 224), Image.Resampling.BILINEAR)
    found = antialiased(jnp.asarray(picture)[None, ..., None], 224)[0, ..., 0]
    np.testing.assert_allclose(found, np.asarray(expected), atol=2e-5)
