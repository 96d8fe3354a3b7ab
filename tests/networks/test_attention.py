"""Attention: masks, normalised queries and keys, contexts, and what cuDNN does not take."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from quick import jit, run

from diffusion_jax.errors import ConfigError
from diffusion_jax.networks import attention


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("implementation", ["auto", "xla"])
def test_masked_keys_are_as_if_cut_away(implementation):
    q, k, v = random(2, 5, 3, 8), random(2, 7, 3, 8, seed=1), random(2, 7, 3, 8, seed=2)
    mask = np.ones((2, 7), bool)
    mask[0, 4:] = mask[1, [0, 2]] = False

    def attend(q, k, v):
        whole = attention.attend(q, k, v, implementation, mask=jnp.asarray(mask))
        cut = [[a[row : row + 1, mask[row]] for a in (k, v)] for row in range(2)]
        rows = [attention.attend(q[i : i + 1], *kv, implementation)[0] for i, kv in enumerate(cut)]
        return whole, rows

    got, want = run(attend, q, k, v)
    for row in range(2):
        np.testing.assert_allclose(got[row], want[row], atol=1e-6)


@pytest.mark.parametrize("implementation", ["auto", "xla"])
def test_row_without_a_key_is_the_mean_and_its_gradient_is_finite(implementation):
    q, k, v = (jnp.asarray(random(1, 4, 2, 8, seed=i)) for i in range(3))
    mask = jnp.zeros((1, 4), bool)

    def total(q, k, v):
        out = attention.attend(q, k, v, implementation, mask=mask)
        return jnp.sum(jnp.sin(out)), out

    gradients, out = run(jax.grad(total, (0, 1, 2), has_aux=True), q, k, v)
    v = np.asarray(v)
    np.testing.assert_allclose(out, np.broadcast_to(v.mean(1, keepdims=True), v.shape), atol=1e-6)
    assert all(np.isfinite(g).all() for g in gradients)


def test_softmax_is_float32_whatever_the_type_of_the_heads():
    # 257 equal logits: in bfloat16 the sum of weights would stop growing at 256.
    q = jnp.zeros((1, 1, 1, 8), jnp.bfloat16)
    v = jnp.ones((1, 1024, 1, 8), jnp.bfloat16)
    for implementation in ("auto", "xla"):
        out = run(functools.partial(attention.attend, implementation=implementation), q, v, v)
        assert out.dtype == jnp.bfloat16
        np.testing.assert_array_equal(out, jnp.ones_like(out))


def test_normalised_queries_and_keys_do_not_grow_with_their_weights():
    def attended(x):
        layer = attention.SelfAttention(24, 3, qk_norm=True, dtype=jnp.float32, rngs=nnx.Rngs(0))
        before = layer(x)
        kernel = layer.qkv.kernel[...].reshape(24, 3, 3, 8).at[:, :, :2].multiply(50)
        layer.qkv.kernel[...] = kernel.reshape(24, 72)
        larger = layer(x)
        layer.q_norm.scale[...] = 3 * layer.q_norm.scale[...]
        return before, larger, layer(x)

    before, larger, scaled = run(attended, random(2, 6, 24))
    np.testing.assert_allclose(larger, before, atol=1e-4)
    assert np.abs(scaled - before).max() > 1e-2


def test_cross_attention_starts_from_zero_and_ignores_the_order_of_its_context():
    def attended(x, context, mask, kernel):
        how = {"qk_norm": True, "dtype": jnp.float32, "rngs": nnx.Rngs(0)}
        layer = attention.CrossAttention(24, 10, 3, **how)
        start = layer(x, context)
        layer.out.kernel[...] = kernel
        return start, layer(x, context), layer(x, context, mask)

    x, context, kernel = random(2, 6, 24), random(2, 5, 10, seed=1), random(24, 24, seed=2)
    mask = jnp.asarray([[True, True, False, True, True]] * 2)
    of = jit(attended)
    start, out, masked = of(x, context, mask, kernel)
    assert not np.any(start)
    _, shuffled, _ = of(x, context[:, [3, 0, 4, 1, 2]], mask, kernel)
    np.testing.assert_allclose(shuffled, out, atol=1e-5)
    other = np.array(context)
    other[:, 2] = 9.0
    _, changed, changed_masked = of(x, other, mask, kernel)
    np.testing.assert_allclose(changed_masked, masked, atol=1e-6)
    assert np.abs(changed - out).max() > 1e-2


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
