"""Magnitude: unit variance in, unit variance out, over random weights."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffusion_jax.networks.edm2_layers import (
    MPAttention,
    MPConv,
    MPCrossAttention,
    MPLabel,
    MPScalars,
    mp_cat,
    mp_fourier,
    mp_silu,
    mp_sum,
    pixel_norm,
    unit_weights,
)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def rms(x):
    return float(jnp.sqrt(jnp.mean(jnp.square(x))))


@pytest.mark.parametrize(("rank", "size"), [(0, 0), (1, 3), (2, 3)])
def test_convolution_keeps_unit_variance_whatever_the_scale_of_its_weights(rank, size):
    x = normal(0, 4 if rank else 256, *(24,) * rank, 64)
    layer = MPConv(64, 256, rank=rank, size=size, dtype=jnp.float32, rngs=nnx.Rngs(1))
    y = layer(x)
    assert y.shape == (*x.shape[:-1], 256)
    inner = y[(slice(None), *(slice(1, -1),) * rank)]  # zeros lie around the map
    assert rms(inner) == pytest.approx(1.0, abs=0.05)
    np.testing.assert_allclose(layer(x, 2.5), 2.5 * y, rtol=1e-5, atol=1e-5)
    layer.kernel[...] = layer.kernel[...] * jnp.linspace(0.5, 7.0, 256)
    np.testing.assert_allclose(layer(x), y, atol=1e-3)


def test_gradient_is_at_right_angles_to_the_weights_and_shrinks_with_their_size():
    x, kernel = normal(0, 8, 16), normal(1, 16, 5)

    def loss(kernel):
        return jnp.sum(jnp.sin(x @ unit_weights(kernel)))

    gradient = jax.grad(loss)(kernel)
    assert np.abs(jnp.sum(gradient * kernel, axis=0)).max() < 1e-4
    np.testing.assert_allclose(jax.grad(loss)(4 * kernel), gradient / 4, rtol=1e-3, atol=1e-6)


def test_unit_weights_have_length_of_the_square_root_of_their_number():
    kernel = unit_weights(3.0 + 10 * normal(0, 3, 3, 6, 5))
    np.testing.assert_allclose(jnp.linalg.norm(kernel.reshape(54, 5), axis=0), math.sqrt(54), 1e-5)
    assert np.isfinite(unit_weights(jnp.zeros((4, 2)))).all()
    assert np.isfinite(jax.grad(lambda k: unit_weights(k).sum())(jnp.zeros((4, 2)))).all()


def test_silu_has_unit_magnitude_by_quadrature():
    x, weight = np.polynomial.hermite_e.hermegauss(80)
    square = (weight * np.square(mp_silu(jnp.asarray(x, jnp.float32)))).sum() / weight.sum()
    assert math.sqrt(square) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("balance", [0.0, 0.3, 0.5, 1.0])
def test_sum_keeps_unit_variance_in_the_balance_asked_for(balance):
    a, b = normal(0, 100_000), normal(1, 100_000)
    y = mp_sum(a, b, balance)
    assert rms(y) == pytest.approx(1.0, abs=0.01)
    share_a, share_b = float(jnp.mean(y * a)), float(jnp.mean(y * b))
    assert share_b * (1 - balance) == pytest.approx(share_a * balance, abs=0.01)


@pytest.mark.parametrize("balance", [0.2, 0.5])
def test_joined_maps_contribute_by_balance_not_by_width(balance):
    a, b = normal(0, 4000, 8), normal(1, 4000, 24)
    y = mp_cat(a, b, balance)
    assert rms(y) == pytest.approx(1.0, abs=0.02)
    power_a, power_b = rms(y[:, :8]) ** 2 * 8, rms(y[:, 8:]) ** 2 * 24
    assert power_b / power_a == pytest.approx((balance / (1 - balance)) ** 2, rel=0.05)


def test_pixel_norm_is_of_each_place():
    x = jnp.linspace(0.1, 50.0, 12).reshape(2, 6, 1) * normal(0, 2, 6, 32)
    np.testing.assert_allclose(jnp.mean(pixel_norm(x) ** 2, axis=-1), 1.0, rtol=1e-3)
    assert pixel_norm(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_fourier_features_have_unit_variance_and_tell_levels_apart():
    level = jnp.linspace(-1.5, 1.1, 200)  # sigma 0.002 to 80
    features = mp_fourier(level, 256, "c_noise")
    np.testing.assert_allclose(jnp.mean(features**2, axis=1), 1.0, atol=0.2)
    assert rms(features) == pytest.approx(1.0, abs=0.02)
    # Two draws of normal frequencies f correlate as E cos(f d) = exp(-(2 pi d)^2 / 2).
    for distance in (0.05, 0.1, 0.5):
        other = mp_fourier(level + distance, 256, "c_noise")
        expected = math.exp(-0.5 * (2 * math.pi * distance) ** 2)
        assert float(jnp.mean(features * other)) == pytest.approx(expected, abs=0.03)
    np.testing.assert_allclose(mp_fourier(8 * level, 256, "logsnr"), features, atol=1e-3)


def test_label_is_the_product_with_a_scaled_one_hot():
    layer = MPLabel(5, 300, rngs=nnx.Rngs(0))
    label = jnp.array([0, 4, 2])
    one_hot = math.sqrt(6) * jax.nn.one_hot(label, 6)
    by_matrix = one_hot @ unit_weights(layer.table[...]) / math.sqrt(6)
    np.testing.assert_allclose(layer(label, None, 3), by_matrix, atol=1e-6)
    assert rms(layer(label, None, 3)) == pytest.approx(1.0, abs=0.1)
    keep = jnp.array([True, False, True])
    none = layer(None, None, 3)
    np.testing.assert_array_equal(layer(label, keep, 3)[1], none[1])
    wrong = layer(jnp.array([5, -1, 9]), keep, 3)
    np.testing.assert_array_equal(np.isnan(wrong).all(1), [True, False, True])
    assert rms(none) == pytest.approx(1.0, abs=0.1)


def test_scalars_have_unit_variance_given_or_not():
    layer = MPScalars(2, 400, dtype=jnp.float32, rngs=nnx.Rngs(0))
    given = layer(normal(0, 16, 2), None, 16)
    assert rms(given) == pytest.approx(1.0, abs=0.1)
    assert rms(layer(None, None, 16)) == pytest.approx(1.0, abs=0.1)
    with pytest.raises(ValueError, match=r"scalar has shape \(4, 3\)"):
        layer(jnp.zeros((4, 3)), None, 4)


def test_attention_of_equal_places_passes_their_value_on():
    # All weights of the softmax are equal then, so the mean over places is one place's value.
    layer = MPAttention(64, 2, implementation="auto", dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = jnp.broadcast_to(normal(0, 8, 1, 1, 64), (8, 3, 3, 64))
    assert rms(layer(x)) == pytest.approx(1.0, abs=0.05)
    np.testing.assert_allclose(layer(5 * x), layer(x), atol=1e-3)  # cosine: scale is no matter


def test_cross_attention_does_not_see_masked_tokens_nor_their_scale():
    layer = MPCrossAttention(64, 16, 2, implementation="auto", dtype=jnp.float32, rngs=nnx.Rngs(0))
    x, tokens = normal(0, 2, 3, 3, 64), normal(1, 2, 5, 16)
    mask = jnp.arange(5)[None] < jnp.array([[3], [5]])
    base = layer(x, tokens, mask)
    np.testing.assert_allclose(layer(x, tokens.at[0, 3:].set(9.0), mask), base, atol=1e-6)
    np.testing.assert_allclose(layer(x, 10 * tokens, mask), base, atol=1e-3)
    assert np.abs(layer(x, tokens.at[0, 2].set(9.0), mask) - base)[0].max() > 1e-2
