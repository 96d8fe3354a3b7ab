"""Networks over tokens: shapes, what a logit depends on, tokens out of range."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import drawn, jit

from diffusion_jax.errors import ConfigError
from diffusion_jax.networks import DiT, TokenNetwork, UNet, UViT, functional

SMALL = {
    "dit": (DiT, (6,), {"patch": 1, "dim": 16, "depth": 1, "heads": 2, "positions": "rope"}),
    "dit2": (DiT, (4, 4), {"patch": 2, "dim": 16, "depth": 1, "heads": 2}),
    "uvit": (UViT, (6,), {"patch": 1, "dim": 16, "depth": 1, "heads": 2}),
    "unet": (UNet, (4, 4), {"channels": 8, "multipliers": (1, 1), "blocks": 1}),
}


def make(kind, **changes):
    network, shape, options = SMALL[kind]
    sizes = {"states": 4, "vocabulary": 3, "token_dim": 8, "noise_input": "t", "num_classes": 2}
    return functional(
        functools.partial(TokenNetwork, network, shape, **{**sizes, **options, **changes})
    )


@pytest.mark.parametrize(
    "kind", ["dit", "dit2", "uvit", pytest.param("unet", marks=pytest.mark.slow)]
)
def test_logits_of_every_token(kind):
    network, shape = make(kind), SMALL[kind][1]
    params, apply = drawn(network.init), jit(network.apply)
    assert params["table"].shape == (4, 8)
    if kind == "dit":
        # The inner network's own sizes reach it.
        assert params["inner"]["stem"]["kernel"].shape == (8, 16)
    x = np.random.default_rng(0).integers(4, size=(5, *shape), dtype=np.int32)
    noise, label = jnp.linspace(0.0, 1.0, 5), {"label": jnp.zeros(5, jnp.int32)}
    logits = apply(params, x, noise, label)
    assert logits.shape == (5, *shape, 3)
    assert logits.dtype == jnp.float32
    # The head starts from zero: every token is as likely as any other.
    np.testing.assert_array_equal(logits, 0.0)

    moved = drawn(network.init, move=0.1)
    changed = np.array(x)
    changed[(0, *(0,) * len(shape))] += 1
    changed %= 4
    one, two = (apply(moved, tokens, noise, label)[0] for tokens in (x, changed))
    assert np.abs(two - one).max() > 1e-3


def test_a_token_out_of_range_is_no_other_token():
    network = make("dit")
    params, apply = drawn(network.init, move=0.1), jit(network.apply)
    for token, finite in ((3, True), (4, False), (-1, False)):
        x = np.zeros((1, 6), np.int32)
        x[0, 2] = token
        assert np.isfinite(apply(params, x, jnp.ones(1), {})).all() == finite


def test_bad_sizes():
    with pytest.raises(ConfigError, match=r"network\.token_dim=0: expected at least 1"):
        functional(functools.partial(TokenNetwork, DiT, (6,), states=3, vocabulary=2, token_dim=0))
    network = make("dit")
    params = jax.eval_shape(network.init, jax.random.key(0))
    with pytest.raises(ValueError, match=r"the network takes \(6,\)"):
        jax.eval_shape(network.apply, params, jnp.zeros((1, 5), jnp.int32), jnp.ones(1), {})
