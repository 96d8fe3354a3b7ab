"""Text: padding, nulls, frozen encoders' tokens, what is refused."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffusion_jax.errors import ConfigError
from diffusion_jax.networks import TextConfig, text

# Tests compile much and compute little.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

SMALL = TextConfig(dim=16, depth=2, heads=2)


def encoded(*captions, length):
    """Bytes + 1, padded with zeros."""
    rows = [[byte + 1 for byte in caption.encode()] for caption in captions]
    return jnp.asarray([row + [0] * (length - len(row)) for row in rows], jnp.int32)


@functools.cache
def module(config=SMALL, **options):
    """The module and a compiled call of it."""
    options = {"dim": 12, "pooled_dim": 10, **options}

    def make():
        return text.TextConditioning(config, **options, dtype=jnp.float32, rngs=nnx.Rngs(0))

    graphdef = nnx.split(nnx.eval_shape(make))[0]
    params = jit(lambda: nnx.state(make(), nnx.Param))()
    call = jit(
        lambda params, entries, batch: nnx.merge(graphdef, params)(entries, batch), static_argnums=2
    )
    return nnx.merge(graphdef, params), functools.partial(call, params)


def conditioning(config=SMALL, **options):
    return module(config, **options)[1]


def run(*captions, length=8, config=SMALL, **entries):
    tokens = encoded(*captions, length=length)
    return conditioning(config)({"text": tokens, **entries}, len(captions))


def assert_same(a, b):
    """Equal pooled vectors, and equal tokens where either is seen."""
    np.testing.assert_allclose(a.pooled, b.pooled, atol=1e-5)
    for one, other in zip(a.tokens, b.tokens, strict=True):
        size = min(len(one), len(other))
        np.testing.assert_allclose(one[:size], other[:size], atol=1e-5)


def test_shapes_and_mask():
    out = run("cat", "fünf")
    assert (out.tokens.shape, out.pooled.shape) == ((2, 8, 12), (2, 10))
    np.testing.assert_array_equal(out.mask.sum(1), [3, 5])  # an umlaut is two bytes
    tokens, mask, pooled = jit(module()[0].encoder)(encoded("cat", length=8))
    assert (tokens.shape, mask.shape, pooled.shape) == ((1, 8, 16), (1, 8), (1, 16))
    np.testing.assert_allclose(pooled[0], tokens[0, :3].mean(0), atol=1e-5)


def test_padding_changes_nothing():
    short, long = run("cat", length=3), run("cat", length=20)
    np.testing.assert_allclose(short.tokens[0], long.tokens[0, :3], atol=1e-5)
    np.testing.assert_allclose(short.pooled, long.pooled, atol=1e-5)
    beside = run("cat", "a dog on a mat", length=20)
    np.testing.assert_allclose(beside.tokens[0, :3], short.tokens[0], atol=1e-5)


def test_order_and_every_byte_matter():
    pooled = run("on", "no", "in", "o", "\x00n").pooled
    distance = np.abs(pooled[:, None] - pooled[None]).max(-1)
    assert distance[~np.eye(5, dtype=bool)].min() > 1e-3


def test_dropped_empty_and_absent_texts_are_the_same_null():
    absent = conditioning()({}, 3)
    mixed = run("cat", "", "dog", text_keep=jnp.asarray([True, True, False]))
    assert absent.tokens.shape == (3, 1, 12)
    np.testing.assert_array_equal(absent.mask, True)
    np.testing.assert_array_equal(mixed.tokens[1:, :1], absent.tokens[1:])
    np.testing.assert_array_equal(mixed.pooled[1:], absent.pooled[1:])
    np.testing.assert_array_equal(mixed.mask.sum(1), [3, 1, 1])
    np.testing.assert_array_equal(mixed.mask[:, 0], True)
    kept = run("cat", "", "dog")
    np.testing.assert_array_equal(mixed.tokens[0], kept.tokens[0])
    assert np.abs(kept.tokens[2, 0] - absent.tokens[2, 0]).max() > 1e-2
    assert np.abs(kept.pooled[2] - absent.pooled[2]).max() > 1e-2


def test_gradients_reach_encoder_and_nulls_and_are_finite_with_empty_texts():
    graphdef, params = nnx.split(module()[0], nnx.Param)

    def loss(params, keep):
        out = nnx.merge(graphdef, params)(
            {"text": encoded("cat", "", length=5), "text_keep": keep}, 2
        )
        seen = jnp.where(out.mask[..., None], out.tokens, 0)
        return jnp.sum(jnp.sin(seen)) + jnp.sum(jnp.sin(out.pooled))

    gradients = jit(jax.grad(loss))(params, jnp.asarray([True, True]))
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 0, path
    dropped = nnx.to_pure_dict(jit(jax.grad(loss))(params, jnp.asarray([False, False])))
    assert not np.any(dropped["encoder"]["table"])
    assert np.abs(dropped["null"]).min() > 0


def test_numbers_that_are_no_bytes_are_loud():
    tokens = jnp.asarray([[1, 257], [256, 0], [-3, 4]], jnp.int32)
    out = conditioning()({"text": tokens}, 3)
    np.testing.assert_array_equal(np.isnan(out.pooled).any(1), [True, False, True])


@pytest.mark.parametrize("attention", ["auto", "xla", "cudnn"])
def test_layouts_and_attentions_agree(attention):
    # Masked attention has no fused kernel: with cudnn the encoder takes xla, on any device.
    options = {"scan": False, "remat": "full", "attention": attention}
    np.testing.assert_allclose(
        conditioning(SMALL, **options)({"text": encoded("cat", length=6)}, 1).pooled,
        run("cat").pooled,
        atol=1e-5,
    )


FROZEN = TextConfig(features=6)


def test_tokens_of_a_frozen_encoder():
    call = conditioning(FROZEN)
    tokens = jax.random.normal(jax.random.key(0), (2, 4, 6))
    mask = jnp.asarray([[True, True, False, False], [True] * 4])
    out = call({"text": tokens, "text_mask": mask}, 2)
    assert (out.tokens.shape, out.pooled.shape) == ((2, 4, 12), (2, 10))
    assert module(FROZEN)[0].encoder is None
    # What lies under the mask may be anything.
    noisy = call({"text": tokens.at[0, 2:].set(jnp.nan), "text_mask": mask}, 2)
    np.testing.assert_array_equal(noisy.pooled, out.pooled)
    assert np.isfinite(noisy.tokens).all()
    cut = call({"text": tokens[:1, :2]}, 1)
    np.testing.assert_allclose(cut.tokens[0], out.tokens[0, :2], atol=1e-6)
    np.testing.assert_allclose(cut.pooled[0], out.pooled[0], atol=1e-6)
    # Their scale does not matter, nor do dropped ones.
    np.testing.assert_allclose(
        call({"text": 100 * tokens, "text_mask": mask}, 2).pooled, out.pooled, atol=1e-3
    )
    keep = jnp.asarray([False, True])
    dropped = call({"text": tokens, "text_mask": mask, "text_keep": keep}, 2)
    np.testing.assert_array_equal(dropped.pooled[0], call({}, 2).pooled[0])
    np.testing.assert_array_equal(dropped.pooled[1], out.pooled[1])


def test_only_what_a_network_uses_is_there():
    pooled = conditioning(SMALL, dim=0)({"text": encoded("cat", length=4)}, 1)
    assert pooled.tokens is None
    assert pooled.pooled.shape == (1, 10)
    tokens = conditioning(SMALL, pooled_dim=0)
    assert tokens({}, 1).pooled is None
    plain = module(SMALL, pooled_dim=0)[0]
    assert plain.pool is plain.null_pooled is None


def test_other_texts_than_the_network_was_built_for_are_refused():
    features = jnp.ones((1, 4, 6))
    with pytest.raises(ValueError, match=r"text is float32 \(1, 4, 6\); this network reads bytes"):
        conditioning()({"text": features}, 1)
    with pytest.raises(ValueError, match=r"\[batch, length, 6\]"):
        conditioning(FROZEN)({"text": encoded("cat", length=4)}, 1)
    with pytest.raises(ValueError, match=r"\[batch, length, 6\]"):
        conditioning(FROZEN)({"text": jnp.ones((1, 4, 5))}, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, r"text\.bytes\.dim=0"),
        ({"depth": 0}, r"text\.bytes\.depth=0"),
        ({"heads": 3}, r"text\.bytes\.heads=3 does not divide .*\(128\); nearest: 2"),
        ({"heads": 128}, r"text\.bytes\.heads=128: heads of 1 .* at most 64 heads"),
        ({"features": -1}, r"text\.features=-1"),
    ],
)
def test_bad_sizes_name_the_field(options, message):
    with pytest.raises(ConfigError, match=message):
        TextConfig(**options).check()
