"""Depthwise convolutions against XLA's grouped ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.evaluation.features import convolutions


@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(8, 8), (7, 12), (1, 2)])
def test_each_channel_by_itself(size, stride, shape):
    random = np.random.default_rng(0)
    x = random.normal(size=(2, *shape, 3)).astype(np.float32)
    kernel = random.normal(size=(size, size, 1, 3)).astype(np.float32)
    grouped = jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=3,
    )
    found = convolutions.depthwise(jnp.asarray(x), jnp.asarray(kernel), stride=stride)
    np.testing.assert_allclose(found, grouped, rtol=1e-4, atol=1e-5)
