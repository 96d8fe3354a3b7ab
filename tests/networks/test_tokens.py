"""Networks over tokens: shapes, what a logit depends on, tokens out of range."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
    params, apply = jax.jit(network.init)(jax.random.key(0)), jax.jit(network.apply)
    assert params["table"].shape == (4, 8)
    if kind == "dit":
        # The inner network's own sizes reach it.
        assert params["inner"]["stem"]["kernel"].shape == (8, 16)
    x = jax.random.randint(jax.random.key(1), (5, *shape), 0, 4)
    noise, label = jnp.linspace(0.0, 1.0, 5), {"label": jnp.zeros(5, jnp.int32)}
    logits = apply(params, x, noise, label)
    assert logits.shape == (5, *shape, 3)
    assert logits.dtype == jnp.float32
    # The head starts from zero: every token is as likely as any other.
    np.testing.assert_array_equal(logits, 0.0)

    def loss(params):
        target = jnp.sin(jnp.arange(x.size * 3.0)).reshape(*x.shape, 3)
        return ((network.apply(params, x, noise, label) - target) ** 2).sum()

    @jax.jit
    def step(params):
        return jax.tree.map(lambda p, g: p - 1e-2 * g, params, jax.grad(loss)(params))

    for _ in range(3):
        params = step(params)
    changed = x.at[(0, *(0,) * len(shape))].add(1) % 4
    one, two = (apply(params, tokens, noise, label)[0] for tokens in (x, changed))
    assert np.abs(two - one).max() > 1e-5


def test_a_token_out_of_range_is_no_other_token():
    network = make("dit")
    params = network.init(jax.random.key(0))
    params["inner"]["head"]["kernel"] += 1.0
    for bad in (4, -1):
        x = jnp.zeros((1, 6), jnp.int32).at[0, 2].set(bad)
        assert jnp.isnan(network.apply(params, x, jnp.ones(1), {})).any()


def test_bad_sizes():
    with pytest.raises(ConfigError, match=r"network\.token_dim=0: expected at least 1"):
        functional(functools.partial(TokenNetwork, DiT, (6,), states=3, vocabulary=2, token_dim=0))
    network = make("dit")
    params = network.init(jax.random.key(0))
    with pytest.raises(ValueError, match=r"the network takes \(6,\)"):
        network.apply(params, jnp.zeros((1, 5), jnp.int32), jnp.ones(1), {})
