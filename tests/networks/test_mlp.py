"""The perceptron: any shape, and sizes it refuses."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest

from diffusion_jax.errors import ConfigError
from diffusion_jax.networks import MLP, functional


def test_output_has_the_shape_of_the_example_and_depth_counts_blocks():
    net = functional(functools.partial(MLP, (3, 4), width=16, depth=11))
    tree = jax.eval_shape(net.init, jax.random.key(0))
    assert len(tree["layers"]) == 11
    out = jax.eval_shape(net.apply, tree, jnp.ones((2, 3, 4)), jnp.ones(2), {})
    assert out.shape == (2, 3, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, r"network\.mlp\.width=0: expected at least 1"),
        ({"width": 33}, r"network\.mlp\.width=33: expected an even number; nearest: 34"),
        ({"depth": 0}, r"network\.mlp\.depth=0"),
        ({"dropout": 2.0}, r"network\.mlp\.dropout=2\.0"),
        ({"noise_input": "timesteps"}, r"unknown \(did you mean 'timestep'\?\)"),
        ({"dtype": "float33"}, r"network\.mlp\.dtype='float33': expected float32"),
        ({"num_classes": -2}, r"network\.mlp\.num_classes=-2"),
    ],
)
def test_bad_sizes_name_the_field(options, message):
    with pytest.raises(ConfigError, match=message):
        functional(functools.partial(MLP, (2,), **options))
