"""Text: padding, nulls, frozen encoders' tokens, what is refused."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from quick import drawn, jit, normal

from diffusion_jax.errors import ConfigError
from diffusion_jax.networks import TextConfig, text
from diffusion_jax.networks.stacking import unstack_blocks

SMALL = TextConfig(dim=16, depth=2, heads=2)


def encoded(*captions, length):
    """Bytes + 1, padded with zeros."""
    rows = [[byte + 1 for byte in caption.encode()] for caption in captions]
    return jnp.asarray([row + [0] * (length - len(row)) for row in rows], jnp.int32)


def abstract(config=SMALL, **options):
    """The module with shapes in place of arrays, and what makes it."""
    options = {"dim": 12, "pooled_dim": 10, **options}

    def make(key=0):
        return text.TextConditioning(config, **options, dtype=jnp.float32, rngs=nnx.Rngs(key))

    return nnx.eval_shape(make), make


@functools.cache
def params(config=SMALL):
    return drawn(lambda key: nnx.to_pure_dict(nnx.state(abstract(config)[1](key), nnx.Param)))


@functools.cache
def conditioning(config=SMALL, **options):
    """A compiled call of the module."""
    graphdef = nnx.split(abstract(config, **options)[0])[0]
    tree = params(config) if options.get("scan", True) else jit(unstack_blocks)(params(config))
    call = jit(
        lambda tree, entries, batch: nnx.merge(graphdef, tree)(entries, batch), static_argnums=2
    )
    return functools.partial(call, tree)


BATCH = 5


def run(*captions, length=8, config=SMALL, keep=None, **options):
    """The captions' rows of a batch that is filled up, so that one program serves all calls."""
    rest = BATCH - len(captions)
    tokens = encoded(*captions, *[""] * rest, length=length)
    keep = jnp.asarray([*(keep or [True] * len(captions)), *[True] * rest])
    out = conditioning(config, **options)({"text": tokens, "text_keep": keep}, BATCH)
    return jax.tree.map(lambda leaf: np.asarray(leaf)[: len(captions)], out)


def test_shapes_and_mask():
    out = run("cat", "fünf")
    assert (out.tokens.shape, out.pooled.shape) == ((2, 8, 12), (2, 10))
    np.testing.assert_array_equal(out.mask.sum(1), [3, 5])  # an umlaut is two bytes
    graphdef = nnx.split(abstract()[0].encoder)[0]
    encode = jit(lambda tree, tokens: nnx.merge(graphdef, tree)(tokens))
    tokens, mask, pooled = encode(params()["encoder"], encoded("cat", length=8))
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
    mixed = run("cat", "", "dog", keep=[True, True, False])
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
    graphdef = nnx.split(abstract()[0])[0]

    @jit
    @jax.grad
    def gradients(params, keep):
        out = nnx.merge(graphdef, params)(
            {"text": encoded("cat", "", length=5), "text_keep": keep}, 2
        )
        seen = jnp.where(out.mask[..., None], out.tokens, 0)
        return jnp.sum(jnp.sin(seen)) + jnp.sum(jnp.sin(out.pooled))

    kept = gradients(params(), jnp.asarray([True, True]))
    for path, leaf in jax.tree_util.tree_leaves_with_path(kept):
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 0, path
    dropped = gradients(params(), jnp.asarray([False, False]))
    assert not np.any(dropped["encoder"]["table"])
    assert np.abs(dropped["null"]).min() > 0


def test_numbers_that_are_no_bytes_are_loud():
    tokens = np.zeros((BATCH, 8), np.int32)
    tokens[:3, :2] = [[1, 257], [256, 0], [-3, 4]]
    out = conditioning()({"text": jnp.asarray(tokens), "text_keep": jnp.ones(BATCH, bool)}, BATCH)
    np.testing.assert_array_equal(np.isnan(out.pooled).any(1)[:3], [True, False, True])


@pytest.mark.parametrize("attention", ["auto", "xla", "cudnn"])
def test_layouts_and_attentions_agree(attention):
    # Masked attention has no fused kernel: with cudnn the encoder takes xla, on any device.
    options = {"scan": False, "remat": "full", "attention": attention}
    np.testing.assert_allclose(run("cat", **options).pooled, run("cat").pooled, atol=1e-5)


FROZEN = TextConfig(features=6)


def test_tokens_of_a_frozen_encoder():
    tokens = np.asarray(normal(2, 4, 6))
    mask = jnp.asarray([[True, True, False, False], [True] * 4])

    def call(tokens, keep=(True, True)):
        entries = {"text": jnp.asarray(tokens), "text_mask": mask, "text_keep": jnp.asarray(keep)}
        return conditioning(FROZEN)(entries, 2)

    out = call(tokens)
    assert (out.tokens.shape, out.pooled.shape) == ((2, 4, 12), (2, 10))
    assert abstract(FROZEN)[0].encoder is None
    # What lies under the mask may be anything.
    noise = np.array(tokens)
    noise[0, 2:] = np.nan
    noisy = call(noise)
    np.testing.assert_array_equal(noisy.pooled, out.pooled)
    assert np.isfinite(noisy.tokens).all()
    cut = conditioning(FROZEN)({"text": jnp.asarray(tokens[:1, :2])}, 1)
    np.testing.assert_allclose(cut.tokens[0], out.tokens[0, :2], atol=1e-6)
    np.testing.assert_allclose(cut.pooled[0], out.pooled[0], atol=1e-6)
    # Their scale does not matter, nor do dropped ones.
    np.testing.assert_allclose(call(100 * tokens).pooled, out.pooled, atol=1e-3)
    dropped = call(tokens, keep=(False, True))
    absent = conditioning(FROZEN)({}, 2)
    np.testing.assert_array_equal(dropped.pooled[0], absent.pooled[0])
    np.testing.assert_array_equal(dropped.pooled[1], out.pooled[1])


def test_only_what_a_network_uses_is_there():
    def out(entries, **options):
        return nnx.eval_shape(lambda: abstract(**options)[1]()(entries, 1))

    pooled = out({"text": encoded("cat", length=4)}, dim=0)
    assert pooled.tokens is None
    assert pooled.pooled.shape == (1, 10)
    assert out({}, pooled_dim=0).pooled is None
    plain = abstract(pooled_dim=0)[0]
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
