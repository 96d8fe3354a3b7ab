"""Adaptive clipping: its bound, unit by unit, and what it leaves alone."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.training.clipping import adaptive_clip

LIMIT = 0.05


def clip(path, grad, param, **options):
    """Through the transformation, with the leaf at a path such as `blocks/kernel`."""
    outer, inner = path.split("/")
    tx = adaptive_clip(LIMIT, **options)
    params = {outer: {inner: jnp.asarray(param)}}
    updates, _ = tx.update({outer: {inner: jnp.asarray(grad)}}, tx.init(params), params)
    return np.asarray(updates[outer][inner])


def norms(array, axes):
    return np.sqrt(np.sum(np.square(array), axis=axes))


# Where a unit's weights are: inputs of a matrix, taps and inputs of a convolution, and the same
# behind the axis of layers that a scan slices; of a vector all of it.
CASES = [
    ("head/kernel", (5, 4), 0),
    ("down/kernel", (3, 3, 5, 4), (0, 1, 2)),
    ("blocks/kernel", (6, 5, 4), 1),
    ("blocks/conv", (6, 3, 3, 5, 4), (1, 2, 3)),
    ("head/bias", (7,), 0),
    ("blocks/bias", (6, 7), 1),
]


@pytest.mark.parametrize(("path", "shape", "axes"), CASES, ids=[case[0] for case in CASES])
def test_each_units_gradient_is_bounded_by_its_weights(path, shape, axes):
    generator = np.random.default_rng(0)
    param = generator.normal(size=shape).astype(np.float32)
    # Large for even units, far under the bound for odd ones.
    size = np.where(np.arange(shape[-1]) % 2 == 0, 10.0, 1e-3 * LIMIT)
    if len(shape) == 1 or path == "blocks/bias":
        size = 10.0
    grad = (generator.normal(size=shape) * size).astype(np.float32)
    clipped = clip(path, grad, param)
    bound = LIMIT * norms(param, axes)
    before, after = norms(grad, axes), norms(clipped, axes)
    assert (before > bound).any()
    np.testing.assert_allclose(after, np.minimum(before, bound), rtol=1e-5)
    # The direction stays.
    cosine = np.sum(grad * clipped, axis=axes) / (before * after)
    np.testing.assert_allclose(cosine, 1.0, rtol=1e-5)


def test_weights_of_zero_can_leave_zero():
    clipped = clip("head/kernel", np.full((4, 2), 3.0, np.float32), np.zeros((4, 2), np.float32))
    np.testing.assert_allclose(norms(clipped, 0), LIMIT * 1e-3, rtol=1e-5)
    assert not clip("head/kernel", np.zeros((4, 2)), np.ones((4, 2))).any()
