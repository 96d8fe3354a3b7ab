"""Attention: masks, normalised queries and keys, contexts, and what cuDNN does not take."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffusion_jax.errors import ConfigError
from diffusion_jax.networks import attention


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("implementation", ["auto", "xla"])
def test_masked_keys_are_as_if_cut_away(implementation):
    q, k, v = random(2, 5, 3, 8), random(2, 7, 3, 8, seed=1), random(2, 7, 3, 8, seed=2)
    mask = np.ones((2, 7), bool)
    mask[0, 4:] = mask[1, [0, 2]] = False
    got = attention.attend(*map(jnp.asarray, (q, k, v)), implementation, mask=jnp.asarray(mask))
    for row in range(2):
        cut = (jnp.asarray(a[row : row + 1, mask[row]]) for a in (k, v))
        want = attention.attend(jnp.asarray(q[row : row + 1]), *cut, implementation)
        np.testing.assert_allclose(got[row], want[0], atol=1e-6)


@pytest.mark.parametrize("implementation", ["auto", "xla"])
def test_row_without_a_key_is_the_mean_and_its_gradient_is_finite(implementation):
    q, k, v = (jnp.asarray(random(1, 4, 2, 8, seed=i)) for i in range(3))
    mask = jnp.zeros((1, 4), bool)

    def total(q, k, v):
        out = attention.attend(q, k, v, implementation, mask=mask)
        return jnp.sum(jnp.sin(out)), out

    gradients, out = jax.grad(total, (0, 1, 2), has_aux=True)(q, k, v)
    np.testing.assert_allclose(out, jnp.broadcast_to(v.mean(1, keepdims=True), v.shape), atol=1e-6)
    assert all(np.isfinite(g).all() for g in gradients)


def test_softmax_is_float32_whatever_the_type_of_the_heads():
    # 257 equal logits: in bfloat16 the sum of weights would stop growing at 256.
    q = jnp.zeros((1, 1, 1, 8), jnp.bfloat16)
    v = jnp.ones((1, 1024, 1, 8), jnp.bfloat16)
    for implementation in ("auto", "xla"):
        out = attention.attend(q, v, v, implementation)
        assert out.dtype == jnp.bfloat16
        np.testing.assert_array_equal(out, jnp.ones_like(out))


def test_normalised_queries_and_keys_do_not_grow_with_their_weights():
    layer = attention.SelfAttention(24, 3, qk_norm=True, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = jnp.asarray(random(2, 6, 24))
    before = layer(x)
    kernel = np.array(layer.qkv.kernel[...]).reshape(24, 3, 3, 8)
    kernel[:, :, :2] *= 50
    layer.qkv.kernel[...] = jnp.asarray(kernel.reshape(24, 72))
    np.testing.assert_allclose(layer(x), before, atol=1e-4)
    layer.q_norm.scale[...] = 3 * layer.q_norm.scale[...]
    assert np.abs(layer(x) - before).max() > 1e-2


def test_cross_attention_starts_from_zero_and_ignores_the_order_of_its_context():
    layer = attention.CrossAttention(24, 10, 3, qk_norm=True, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x, context = jnp.asarray(random(2, 6, 24)), jnp.asarray(random(2, 5, 10, seed=1))
    assert not np.any(layer(x, context))
    layer.out.kernel[...] = jnp.asarray(random(24, 24, seed=2))
    out = layer(x, context)
    order = np.array([3, 0, 4, 1, 2])
    np.testing.assert_allclose(layer(x, context[:, order]), out, atol=1e-5)
    mask = jnp.asarray([[True, True, False, True, True]] * 2)
    other = context.at[:, 2].set(9.0)
    np.testing.assert_allclose(layer(x, other, mask), layer(x, context, mask), atol=1e-6)
    assert np.abs(layer(x, other) - out).max() > 1e-2


def test_cudnn_is_refused_where_it_cannot_run():
    q = jnp.ones((1, 2, 1, 8), jnp.bfloat16)
    with pytest.raises(ConfigError, match=r"attention=cudnn needs an NVIDIA GPU.* on cpu; set"):
        attention.attend(q, q, q, "cudnn")
    field = "network.dit.attention"
    with pytest.raises(
        ConfigError, match=r"network\.dit\.attention=cudnn takes bfloat16 .*32; set"
    ):
        attention.check_attention(field, "cudnn", 64, jnp.dtype("float32"))
    with pytest.raises(ConfigError, match="multiple of 8 up to 256 entries, not 36"):
        attention.check_attention(field, "cudnn", 36, jnp.dtype("bfloat16"))
    attention.check_attention(field, "cudnn", 64, jnp.dtype("bfloat16"))
    attention.check_attention(field, "xla", 36, jnp.dtype("float32"))


def test_identity_maps_of_patches():
    """Each patch sees itself and the tokens beside, as in one of its own; their map stays."""
    rng = np.random.default_rng(5)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 6, 2, 4)), jnp.float32) for _ in range(3))
    np.testing.assert_array_equal(attention.attend_alone(q, k, v), v)
    beside, mask = 2, np.ones((2, 6), bool)
    mask[0, 1] = False
    got = attention.attend_alone(q, k, v, beside, mask=jnp.asarray(mask))
    whole = attention.attend(q, k, v, mask=jnp.asarray(mask))
    np.testing.assert_allclose(got[:, :beside], whole[:, :beside], atol=1e-6)
    for patch in range(beside, 6):
        seen = [0, 1, patch]
        parts = (q[:, patch : patch + 1], k[:, seen], v[:, seen])
        want = attention.attend(*parts, mask=jnp.asarray(mask[:, seen]))
        np.testing.assert_allclose(got[:, patch : patch + 1], want, atol=1e-6)
