"""Convolutions against a direct NumPy sum, and the fast upsampling against its definition."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from quick import jit, normal, run

from diffusion_jax.networks import conv


def direct(x: np.ndarray, kernel: np.ndarray, stride: int) -> np.ndarray:
    """Cross-correlation with zero padding, one output entry at a time, in float64."""
    rank = x.ndim - 2
    half = kernel.shape[0] // 2
    padded = np.pad(x.astype(np.float64), [(0, 0)] + [(half, half)] * rank + [(0, 0)])
    space = [range(0, size, stride) for size in x.shape[1:-1]]
    out = np.zeros((x.shape[0], *map(len, space), kernel.shape[-1]))
    for corner in itertools.product(*space):
        window = padded[(slice(None), *(slice(i, i + 2 * half + 1) for i in corner))]
        index = tuple(i // stride for i in corner)
        out[(slice(None), *index)] = np.tensordot(window, kernel, kernel.ndim - 1)
    return out


@pytest.mark.parametrize(
    ("space", "size", "stride"),
    [((5, 4), 3, 1), ((6, 4), 3, 2), ((4, 4), 1, 1), ((7,), 3, 1), ((3, 4, 2), 3, 1)],
)
def test_convolve_is_the_padded_sum(space, size, stride):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *space, 3)).astype(np.float32)
    kernel = rng.normal(size=(*(size,) * len(space), 3, 5)).astype(np.float32)
    got = run(lambda x, kernel: conv.convolve(x, kernel, stride), x, kernel)
    np.testing.assert_allclose(got, direct(x, kernel, stride), rtol=1e-4, atol=1e-4)


def test_double_repeats_entries():
    x = np.arange(12, dtype=np.float32).reshape(1, 2, 3, 2)
    want = x.repeat(2, axis=1).repeat(2, axis=2)
    np.testing.assert_array_equal(run(conv.double, x), want)


@pytest.mark.parametrize("space", [(4, 6), (5,), (2, 3, 2)])
def test_upsampling_by_phases_equals_its_definition_with_gradients(space):
    x = normal(2, *space, 3)
    kernel = normal(*(3,) * len(space), 3, 4, seed=1)
    probe = normal(2, *(2 * size for size in space), 4, seed=2)

    def of(function):
        loss = jax.value_and_grad(lambda x, k: jnp.sum(probe * function(x, k)), (0, 1))
        return jit(loss)(x, kernel)

    plain = of(lambda x, k: conv.convolve(conv.double(x), k))
    fast = of(conv.convolve_doubled)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(fast), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-4)


def test_other_backends_get_the_same_upsampling(monkeypatch):
    def upsampled(x):
        layer = conv.Upsample(3, rank=2, dtype=jnp.float32, rngs=nnx.Rngs(0))
        layer.conv.bias[...] = jnp.arange(3.0)
        here = layer(x)
        monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
        return here, layer(x)

    traced = jit(upsampled).lower(normal(2, 4, 4, 3))
    monkeypatch.undo()
    here, there = traced.compile()(normal(2, 4, 4, 3))
    np.testing.assert_allclose(there, here, rtol=1e-4, atol=1e-5)
