"""Magnitude: unit variance in, unit variance out, over random weights."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from quick import jit, normal, run

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


def rms(x):
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


@pytest.mark.parametrize(("rank", "size"), [(0, 0), (1, 3), (2, 3)])
def test_convolution_keeps_unit_variance_whatever_the_scale_of_its_weights(rank, size):
    x = normal(4 if rank else 256, *(24,) * rank, 64)

    def maps(x):
        layer = MPConv(64, 256, rank=rank, size=size, dtype=jnp.float32, rngs=nnx.Rngs(1))
        y, more = layer(x), layer(x, 2.5)
        layer.kernel[...] = layer.kernel[...] * jnp.linspace(0.5, 7.0, 256)
        return y, more, layer(x)

    y, more, scaled = jax.jit(maps)(x)  # sums of thousands, as exact as for users
    assert y.shape == (*x.shape[:-1], 256)
    inner = np.asarray(y)[(slice(None), *(slice(1, -1),) * rank)]  # zeros lie around the map
    assert rms(inner) == pytest.approx(1.0, abs=0.05)
    np.testing.assert_allclose(more, 2.5 * np.asarray(y), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(scaled, y, atol=1e-3)


def test_gradient_is_at_right_angles_to_the_weights_and_shrinks_with_their_size():
    x, kernel = normal(8, 16, seed=0), normal(16, 5, seed=1)

    def loss(kernel):
        return jnp.sum(jnp.sin(x @ unit_weights(kernel)))

    of, kernel = jit(jax.grad(loss)), np.asarray(kernel)
    gradient = np.asarray(of(kernel))
    assert np.abs(np.sum(gradient * kernel, axis=0)).max() < 1e-4
    np.testing.assert_allclose(of(4 * kernel), gradient / 4, rtol=1e-3, atol=1e-6)


def test_unit_weights_have_length_of_the_square_root_of_their_number():
    kernel = np.asarray(run(unit_weights, 3.0 + 10 * np.asarray(normal(3, 3, 6, 5))))
    np.testing.assert_allclose(np.linalg.norm(kernel.reshape(54, 5), axis=0), math.sqrt(54), 1e-5)
    both = run(jax.value_and_grad(lambda k: unit_weights(k).sum()), jnp.zeros((4, 2)))
    assert all(np.isfinite(leaf).all() for leaf in both)


def test_silu_has_unit_magnitude_by_quadrature():
    x, weight = np.polynomial.hermite_e.hermegauss(80)
    square = (weight * np.square(run(mp_silu, jnp.asarray(x, jnp.float32)))).sum() / weight.sum()
    assert math.sqrt(square) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("balance", [0.0, 0.3, 0.5, 1.0])
def test_sum_keeps_unit_variance_in_the_balance_asked_for(balance):
    a, b = normal(100_000, seed=0), normal(100_000, seed=1)
    y = np.asarray(run(lambda a, b: mp_sum(a, b, balance), a, b))
    assert rms(y) == pytest.approx(1.0, abs=0.01)
    share_a, share_b = np.mean(y * np.asarray(a)), np.mean(y * np.asarray(b))
    assert share_b * (1 - balance) == pytest.approx(share_a * balance, abs=0.01)


@pytest.mark.parametrize("balance", [0.2, 0.5])
def test_joined_maps_contribute_by_balance_not_by_width(balance):
    a, b = normal(4000, 8, seed=0), normal(4000, 24, seed=1)
    y = np.asarray(run(lambda a, b: mp_cat(a, b, balance), a, b))
    assert rms(y) == pytest.approx(1.0, abs=0.02)
    power_a, power_b = rms(y[:, :8]) ** 2 * 8, rms(y[:, 8:]) ** 2 * 24
    assert power_b / power_a == pytest.approx((balance / (1 - balance)) ** 2, rel=0.05)


def test_pixel_norm_is_of_each_place():
    x = np.linspace(0.1, 50.0, 12, dtype=np.float32).reshape(2, 6, 1) * normal(2, 6, 32)
    np.testing.assert_allclose(np.mean(np.asarray(run(pixel_norm, x)) ** 2, -1), 1.0, rtol=1e-3)
    half = jax.ShapeDtypeStruct(x.shape, jnp.bfloat16)
    assert jax.eval_shape(pixel_norm, half).dtype == jnp.bfloat16


def test_fourier_features_have_unit_variance_and_tell_levels_apart():
    level = np.linspace(-1.5, 1.1, 200, dtype=np.float32)  # sigma 0.002 to 80
    of = jit(lambda level: mp_fourier(level, 256, "c_noise"))
    features = np.asarray(of(level))
    np.testing.assert_allclose(np.mean(features**2, axis=1), 1.0, atol=0.2)
    assert rms(features) == pytest.approx(1.0, abs=0.02)
    # Two draws of normal frequencies f correlate as E cos(f d) = exp(-(2 pi d)^2 / 2).
    for distance in (0.05, 0.1, 0.5):
        expected = math.exp(-0.5 * (2 * math.pi * distance) ** 2)
        assert np.mean(features * of(level + distance)) == pytest.approx(expected, abs=0.03)
    logsnr = run(lambda level: mp_fourier(level, 256, "logsnr"), 8 * level)
    np.testing.assert_allclose(logsnr, features, atol=1e-3)


def test_label_is_the_product_with_a_scaled_one_hot():
    keep = jnp.array([True, False, True])

    def vectors(label):
        layer = MPLabel(5, 300, rngs=nnx.Rngs(0))
        one_hot = math.sqrt(6) * jax.nn.one_hot(label, 6)
        by_matrix = one_hot @ unit_weights(layer.table[...]) / math.sqrt(6)
        return layer(label, None, 3), by_matrix, layer(label, keep, 3), layer(None, None, 3)

    of = jit(vectors)
    given, by_matrix, dropped, none = of(jnp.array([0, 4, 2]))
    np.testing.assert_allclose(given, by_matrix, atol=1e-6)
    assert rms(given) == pytest.approx(1.0, abs=0.1)
    np.testing.assert_array_equal(dropped[1], none[1])
    np.testing.assert_allclose(dropped[::2], given[::2], atol=1e-6)
    wrong = of(jnp.array([5, -1, 9]))[2]
    np.testing.assert_array_equal(np.isnan(wrong).all(1), [True, False, True])
    assert rms(none) == pytest.approx(1.0, abs=0.1)


def test_scalars_have_unit_variance_given_or_not():
    def vectors(scalar):
        layer = MPScalars(2, 400, dtype=jnp.float32, rngs=nnx.Rngs(0))
        keep = jnp.arange(16) < 8
        return layer(scalar, None, 16), layer(None, None, 16), layer(scalar, keep, 16)

    given, none, half = (np.asarray(vector) for vector in run(vectors, normal(16, 2)))
    for vector in (given, none):
        assert rms(vector) == pytest.approx(1.0, abs=0.1)
    np.testing.assert_allclose(half, np.concatenate([given[:8], none[8:]]), atol=1e-6)
    with pytest.raises(ValueError, match=r"scalar has shape \(16, 3\)"):
        jax.eval_shape(vectors, jnp.zeros((16, 3)))


def test_attention_of_equal_places_passes_their_value_on():
    # All weights of the softmax are equal then, so the mean over places is one place's value.
    def attend(x):
        how = {"implementation": "auto", "dtype": jnp.float32, "rngs": nnx.Rngs(0)}
        return MPAttention(64, 2, **how)(x)

    attend, x = jit(attend), np.broadcast_to(normal(8, 1, 1, 64), (8, 3, 3, 64))
    assert rms(attend(x)) == pytest.approx(1.0, abs=0.05)
    np.testing.assert_allclose(attend(5 * x), attend(x), atol=1e-3)  # cosine: scale is no matter


def test_cross_attention_does_not_see_masked_tokens_nor_their_scale():
    x, tokens = normal(2, 3, 3, 64), np.asarray(normal(2, 5, 16, seed=1))
    mask = jnp.arange(5)[None] < jnp.array([[3], [5]])

    def attend(tokens):
        how = {"implementation": "auto", "dtype": jnp.float32, "rngs": nnx.Rngs(0)}
        return MPCrossAttention(64, 16, 2, **how)(x, tokens, mask)

    def changed(places):
        other = np.array(tokens)
        other[0, places] = 9.0
        return other

    attend = jit(attend)
    base = attend(tokens)
    np.testing.assert_allclose(attend(changed(slice(3, None))), base, atol=1e-6)
    np.testing.assert_allclose(attend(10 * tokens), base, atol=1e-3)
    assert np.abs(attend(changed(2)) - base)[0].max() > 1e-2
