"""Alignment with a frozen encoder: its bounds, its grids, its gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick import jit, normal, run

from diffusion_jax.errors import ConfigError
from diffusion_jax.objectives.alignment import Alignment, network_encoder


def linear_encoder(frozen, x0):
    return x0 @ frozen["kernel"]


def make(encode=linear_encoder, **options):
    return Alignment(
        **{"encode": encode, "feature_dim": 6, "target_dim": 3, "hidden": 16, **options}
    )


def identity(dim):
    """A projection that hands large positive numbers through, which SiLU hardly changes."""
    layer = {"kernel": jnp.eye(dim), "bias": jnp.zeros(dim)}
    return {name: layer for name in ("fc1", "fc2", "fc3")}


def test_equal_directions_are_minus_one_and_right_angles_nothing():
    part = make(feature_dim=3, hidden=3)
    frozen = {"alignment": {"kernel": 2.0 * jnp.eye(3)}}
    x0 = np.broadcast_to(np.float32([50.0, 0.0, 0.0]), (2, 4, 3))
    features = np.array(x0)
    features[1] = [0.0, 80.0, 0.0]
    values = run(part, identity(3), features, frozen, x0)
    np.testing.assert_allclose(values, [-1.0, 0.0], atol=1e-5)


def test_a_grid_of_other_size_is_averaged():
    """Four encoder tokens where the network has one: their mean."""
    part = make(feature_dim=2, target_dim=2, hidden=2)
    x0 = np.zeros((1, 2, 2, 2), np.float32)
    x0[0, 0, 0, 0] = x0[0, 1, 1, 1] = 60.0
    frozen = {"alignment": {"kernel": jnp.eye(2)}}
    diagonal = jnp.full((1, 1, 2), 40.0)
    np.testing.assert_allclose(run(part, identity(2), diagonal, frozen, x0), -1.0, atol=1e-5)


def test_the_projection_and_the_features_learn_and_the_encoder_does_not():
    part = make()
    x0, features = normal(8, 4, 5), normal(8, 4, 6, seed=1)
    frozen = {"alignment": {"kernel": normal(5, 3, seed=2)}}
    trained = {"own": run(part.init, jax.random.key(3)), "features": features}

    def loss(trained, frozen):
        return jnp.mean(part(trained["own"], trained["features"], frozen, x0))

    _, frozen_grad = run(jax.grad(loss, argnums=(0, 1)), trained, frozen)
    assert not np.asarray(frozen_grad["alignment"]["kernel"]).any()
    tx = optax.adam(1e-2)

    def step(carry, _):
        trained, state = carry
        value, grads = jax.value_and_grad(loss)(trained, frozen)
        updates, state = tx.update(grads, state)
        return (optax.apply_updates(trained, updates), state), value

    many = jit(lambda trained: jax.lax.scan(step, (trained, tx.init(trained)), length=200))
    _, values = many(trained)
    assert -1.0 <= float(values[-1]) < -0.95 < float(values[0])


def test_an_own_network_as_encoder():
    def apply(params, x, noise, conditioning, *, return_features):
        assert return_features
        assert conditioning == {}
        return x, x * params["scale"] + noise[:, None, None]

    encode = network_encoder(apply, 7.0)
    x0 = jnp.ones((2, 4, 3))
    np.testing.assert_allclose(encode({"scale": 2.0}, x0), 9.0)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((2, 4, 5), {}, "alignment.feature_dim=6: there are 5"),
        ((2, 4, 6), {"target_dim": 4}, "alignment.target_dim=4: there are 3"),
        ((2, 5, 6), {}, "the network has 5 tokens and the encoder 4"),
    ],
)
def test_what_does_not_fit_is_one_line(shape, options, message):
    part = make(**options)
    frozen = {"alignment": {"kernel": jnp.ones((5, 3))}}
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(
            lambda key: part(part.init(key), jnp.ones(shape), frozen, jnp.ones((2, 4, 5))),
            jax.random.key(0),
        )
