"""Structure of the U-Net: where it attends, what sizes it takes, other ranks."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffusion_jax.errors import ConfigError
from diffusion_jax.networks import UNet, functional

# Tests compile much and compute little.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

SMALL = functools.partial(UNet, channels=8, multipliers=(1, 2, 2), blocks=1, heads=2)


def abstract(**options) -> UNet:
    """The module with shapes in place of arrays."""
    return nnx.eval_shape(lambda: SMALL(**options, rngs=nnx.Rngs(0)))


def attended(**options):
    """Names of the parts that hold attention."""
    net = abstract(**options)
    parts = {"down": net.down, "middle": net.middle, "up": net.up}
    return {
        f"{side}/{name}"
        for side, stages in parts.items()
        for name in stages
        if getattr(stages[name], "attention", None) is not None
    }


def test_attention_stands_at_the_chosen_resolutions():
    assert attended(shape=(32, 32, 3), attention_resolutions=()) == {"middle/0"}
    assert attended(shape=(32, 32, 3), attention_resolutions=(), middle_attention=False) == set()
    level1 = {"down/level1_0", "up/level1_0", "up/level1_1"}
    assert attended(shape=(32, 32, 3)) == level1 | {"middle/0"}
    assert attended(shape=(8, 16, 3), attention_resolutions=(8,)) == level1 | {"middle/0"}
    both = attended(shape=(16, 16, 3), attention_resolutions=(8, 4))
    assert both == level1 | {"down/level2_0", "up/level2_0", "up/level2_1", "middle/0"}
    assert attended(shape=(8, 8, 3)) == {"middle/0"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"shape": (8, 8, 1), "multipliers": (1, 1, 2, 2, 2)},
            r"network\.unet\.multipliers=\(1, 1, 2, 2, 2\): 8x8 cannot be halved 4 times; give at "
            r"most 4 multipliers, or pad the data to a multiple of 16",
        ),
        ({"shape": (28, 20, 1), "multipliers": (1, 2, 2, 2)}, r"28x20 cannot be halved 3 times"),
        ({"multipliers": ()}, r"network\.unet\.multipliers=\(\)"),
        ({"multipliers": (1, 0)}, r"network\.unet\.multipliers=\(1, 0\)"),
        ({"channels": 0}, r"network\.unet\.channels=0: expected at least 1"),
        ({"channels": 9}, r"network\.unet\.channels=9: expected an even number; nearest: 10"),
        ({"blocks": 0}, r"network\.unet\.blocks=0"),
        (
            {"attention_resolutions": (16, 7)},
            r"network\.unet\.attention_resolutions=\(16, 7\): .* side of 7; levels: 32, 16, 8; "
            r"nearest: 8",
        ),
        ({"heads": 3}, r"network\.unet\.heads=3 does not divide .* \(16\); nearest: 2"),
        ({"head_dim": 5}, r"network\.unet\.head_dim=5 does not divide .* \(16\); nearest: 4"),
        ({"dropout": 1.0}, r"network\.unet\.dropout=1\.0"),
        ({"noise_input": "logsn"}, r"noise_input='logsn' is unknown \(did you mean 'logsnr'\?\)"),
        ({"attention": "flash"}, r"network\.unet\.attention='flash' is unknown"),
        ({"dtype": "int32"}, r"network\.unet\.dtype='int32': expected float32"),
        ({"shape": (8,)}, r"shape=\(8,\)"),
    ],
)
def test_bad_sizes_name_the_field(options, message):
    with pytest.raises(ConfigError, match=message):
        functional(functools.partial(SMALL, **{"shape": (32, 32, 3), **options}))


def test_head_dim_sets_the_number_of_heads():
    net = abstract(shape=(32, 32, 3), head_dim=4)
    assert net.middle["0"].attention.attention.heads == 4


def test_audio_has_one_spatial_axis_and_channels_can_change():
    net = functional(functools.partial(SMALL, (16, 2), out_channels=5, attention_resolutions=(8,)))
    params = jax.eval_shape(net.init, jax.random.key(0))
    assert params["stem"]["kernel"].shape == (3, 2, 8)
    out = jax.eval_shape(net.apply, params, jnp.ones((3, 16, 2)), jnp.zeros(3), {})
    assert out.shape == (3, 16, 5)


def test_skip_connections_reach_the_output():
    # With everything below the first level silenced the input still shapes the output.
    net = functional(functools.partial(SMALL, (4, 4, 1), multipliers=(1, 2), blocks=1))
    params = jit(net.init)(jax.random.key(0))
    params["head"]["kernel"] = jax.random.normal(jax.random.key(1), params["head"]["kernel"].shape)
    params["up"]["level1_upsample"]["conv"]["kernel"] *= 0
    out = jit(net.apply)(
        params, jnp.stack([jnp.zeros((4, 4, 1)), jnp.eye(4)[..., None]]), jnp.zeros(2), {}
    )
    assert np.abs(out[0] - out[1]).max() > 1e-2
