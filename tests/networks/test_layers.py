"""Group norm against NumPy, dropout by key, embeddings, attention, sharding constraint."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from quick import jit, normal, run

from diffusion_jax.networks import attention, embeddings, layers


@pytest.mark.parametrize(("channels", "groups"), [(64, 32), (48, 24), (6, 6), (34, 17), (37, 1)])
def test_group_norm_against_numpy(channels, groups):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(3, 4, 5, channels)) * 2 + 7).astype(np.float32)
    scale, shift = rng.normal(size=(2, 3, channels)).astype(np.float32)
    gain, bias = rng.normal(size=(2, channels)).astype(np.float32)

    def norms(x, scale, shift, gain, bias):
        norm = layers.GroupNorm(channels, rngs=nnx.Rngs(0))
        assert norm.groups == groups
        norm.scale[...], norm.bias[...] = gain, bias
        return norm(x), norm(x, scale, shift)

    plain, got = run(norms, x, scale, shift, gain, bias)
    want = np.empty_like(x, dtype=np.float64)
    for example in range(3):
        for part in np.split(np.arange(channels), groups):
            values = x[example][..., part].astype(np.float64)
            want[example][..., part] = (values - values.mean()) / np.sqrt(values.var() + 1e-5)
    want = want * gain + bias
    np.testing.assert_allclose(plain, want, atol=1e-4)
    adapted = want * (1 + scale[:, None, None]) + shift[:, None, None]
    np.testing.assert_allclose(got, adapted, atol=4e-4)


def test_group_norm_ignores_scale_and_offset_of_its_input():
    x = normal(2, 8, 32)
    norm = jit(lambda x: layers.GroupNorm(32, rngs=nnx.Rngs(0))(x))
    np.testing.assert_allclose(norm(5 * np.asarray(x) + 3), norm(x), atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6), (2, 3, 4, 6)])
def test_linear_is_that_of_flax(shape, dtype):
    kernel, x = normal(6, 7), normal(*shape, seed=1)

    def with_gradients(layer_type):
        def loss(layer, x):
            out = layer(x)
            return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

        layer = layer_type(6, 7, dtype=dtype, rngs=nnx.Rngs(3))
        layer.kernel[...], layer.bias[...] = kernel, jnp.arange(7.0)
        gradients, out = nnx.grad(loss, argnums=(0, 1), has_aux=True)(layer, x)
        assert out.dtype == dtype
        return nnx.to_pure_dict(gradients[0]), gradients[1], out

    got, want = run(lambda: (with_gradients(layers.Linear), with_gradients(nnx.Linear)))
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.float32(a), np.float32(b), atol=tolerance, rtol=tolerance
        ),
        got,
        want,
    )


def test_dropout_is_a_function_of_its_key():
    x = jnp.ones((64, 256))
    drop = jit(lambda key: layers.dropout(x, 0.25, key))
    first = drop(jax.random.key(0))
    np.testing.assert_array_equal(first, drop(jax.random.key(0)))
    assert not np.array_equal(first, drop(jax.random.key(1)))
    assert set(np.unique(first)) == {np.float32(0), np.float32(1 / 0.75)}
    assert abs(float((first == 0).mean()) - 0.25) < 0.02
    np.testing.assert_array_equal(layers.dropout(x, 0.25, None), x)


def test_dropout_with_keys_per_example_does_not_depend_on_the_batch():
    def dropped():
        keys, x = jax.random.split(jax.random.key(0), 6), jnp.ones((6, 128))
        return layers.dropout(x, 0.5, keys), layers.dropout(x[2:4], 0.5, keys[2:4])

    whole, part = run(dropped)
    np.testing.assert_array_equal(whole[2:4], part)
    assert not np.array_equal(whole[0], whole[1])


def test_folded_keys_differ_by_part_and_by_example():
    def folded():
        keys = jax.random.split(jax.random.key(0), 2)
        parts = [layers.fold_key(keys, i) for i in range(3)]
        return [jax.random.key_data(part) for part in (*parts, layers.fold_key(keys[1], 2))]

    *parts, one = run(folded)
    assert len(np.unique(np.concatenate(parts), axis=0)) == 6
    np.testing.assert_array_equal(parts[2][1], one)


def test_sinusoids_turn_as_complex_numbers_do():
    # cos(a+b) + i sin(a+b) = (cos a + i sin a)(cos b + i sin b) at every frequency.
    sinusoids = jit(lambda position: embeddings.sinusoidal(position, 32))

    def turn(position):
        parts = np.asarray(sinusoids(jnp.asarray([position])), np.float64)[0]
        return parts[:16] + 1j * parts[16:]

    np.testing.assert_allclose(turn(2.5), turn(2.0) * turn(0.5), atol=1e-5)
    np.testing.assert_allclose(turn(1.0)[0], np.exp(1j), atol=1e-6)
    assert np.abs(np.angle(turn(1.0)[-1])) < 3e-4


def test_position_products_depend_on_the_offset_alone():
    table = embeddings.sincos_positions((4, 5), 16).reshape(4, 5, 16).astype(np.float64)
    assert table.shape == (4, 5, 16)
    products = [
        (table[i, j] * table[i + 2, j + 1]).sum() for i, j in [(0, 0), (1, 3), (0, 2), (1, 1)]
    ]
    np.testing.assert_allclose(products, products[0], rtol=1e-5)
    assert len(np.unique(table.reshape(20, 16).round(6), axis=0)) == 20


def test_attention_commutes_with_permuting_tokens():
    def attend(x):
        return attention.SelfAttention(24, 3, dtype=jnp.float32, rngs=nnx.Rngs(0))(x)

    attend, x = jit(attend), np.asarray(normal(2, 10, 24))
    order = np.random.default_rng(0).permutation(10)
    np.testing.assert_allclose(attend(x[:, order]), attend(x)[:, order], atol=1e-5)


@pytest.mark.parametrize("implementation", ["auto", "xla"])
def test_attention_against_numpy(implementation):
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 2, 7, 3, 8)).astype(np.float32)
    want = np.empty_like(q)
    for b in range(2):
        for head in range(3):
            scores = q[b, :, head] @ k[b, :, head].T / np.sqrt(8)
            weights = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
            want[b, :, head] = weights @ v[b, :, head]
    got = run(lambda q, k, v: attention.attend(q, k, v, implementation), q, k, v)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_batch_constraint_shards_over_the_ambient_mesh_alone():
    x = jnp.arange(32.0).reshape(16, 2)
    np.testing.assert_array_equal(layers.constrain_batch(x), x)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), (jax.sharding.AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
        constrained = jit(layers.constrain_batch)(x)
        assert constrained.sharding.spec == P(("data", "fsdp"))
        odd = jit(layers.constrain_batch)(x[:3])
        np.testing.assert_array_equal(odd, x[:3])
