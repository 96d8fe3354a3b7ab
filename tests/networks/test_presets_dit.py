"""Parameters and multiply-adds of the presets against the published tables."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from diffusion_jax.errors import ConfigError
from diffusion_jax.networks import DiT, UViT, presets_dit
from diffusion_jax.parallel.flops import count_flops

LATENTS = (32, 32, 4)


def counts(make):
    """Millions of parameters and, for one example, billions of multiply-adds."""
    net, state = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    x = jax.ShapeDtypeStruct((1, *make.args[0]), jnp.float32)
    noise = jax.ShapeDtypeStruct((1,), jnp.float32)
    conditioning = {"label": jax.ShapeDtypeStruct((1,), jnp.int32)}

    def apply(state, *inputs):
        return nnx.merge(net, state)(*inputs)

    flops = count_flops(apply, state, x, noise, conditioning)
    return sum(leaf.size for leaf in jax.tree.leaves(state)) / 1e6, flops / 2e9


# Peebles & Xie 2023, table 4 (256 x 256) and the text on 512 x 512. They count multiply-adds,
# normalisation among them, and learn the variance (twice the channels out).
@pytest.mark.parametrize(
    ("name", "shape", "millions", "billions"),
    [
        ("DiT-S/8", LATENTS, 33, 0.36),
        ("DiT-S/4", LATENTS, 33, 1.41),
        ("DiT-S/2", LATENTS, 33, 6.06),
        ("DiT-B/8", LATENTS, 131, 1.42),
        ("DiT-B/4", LATENTS, 130, 5.56),
        ("DiT-B/2", LATENTS, 130, 23.01),
        ("DiT-L/8", LATENTS, 459, 5.01),
        ("DiT-L/4", LATENTS, 458, 19.70),
        ("DiT-L/2", LATENTS, 458, 80.71),
        ("DiT-XL/8", LATENTS, 676, 7.39),
        ("DiT-XL/4", LATENTS, 675, 29.05),
        ("DiT-XL/2", LATENTS, 675, 118.64),
        ("DiT-XL/2", (64, 64, 4), 675, 524.60),
    ],
)
def test_dit(name, shape, millions, billions):
    options = presets_dit.dit_preset(name)
    make = functools.partial(DiT, shape, num_classes=1000, out_channels=8, **options)
    parameters, multiply_adds = counts(make)
    assert round(parameters) == millions
    assert multiply_adds == pytest.approx(billions, rel=3e-4, abs=0.006)


# Bao et al. 2023, table 1 and, for U-ViT-H/2, the comparison with other models.
@pytest.mark.parametrize(
    ("name", "shape", "classes", "millions", "billions"),
    [
        ("U-ViT-S/2", (32, 32, 3), 0, 44, None),
        ("U-ViT-S-deep/2", (32, 32, 4), 0, 58, None),
        ("U-ViT-M/2", LATENTS, 1000, 131, None),
        ("U-ViT-L/2", LATENTS, 1000, 287, None),
        ("U-ViT-H/2", LATENTS, 1000, 501, 133),
    ],
)
def test_uvit(name, shape, classes, millions, billions):
    options = presets_dit.uvit_preset(name)
    parameters, multiply_adds = counts(
        functools.partial(UViT, shape, num_classes=classes, **options)
    )
    assert round(parameters) == millions
    if billions is not None:
        assert round(multiply_adds) == billions


# Li & He 2025, parameters of JiT at 256 x 256.
@pytest.mark.parametrize(
    ("name", "millions"), [("JiT-B/16", 131), ("JiT-L/16", 459), ("JiT-H/16", 953)]
)
def test_jit(name, millions):
    options = presets_dit.dit_preset(name)
    parameters, _ = counts(functools.partial(DiT, (256, 256, 3), num_classes=1000, **options))
    assert round(parameters) == millions


@pytest.mark.parametrize(
    ("preset", "name", "message"),
    [
        ("dit_preset", "DiT-XXL/2", r"network\.dit\.preset='DiT-XXL' is unknown .*'DiT-XL'"),
        ("dit_preset", "DiT-XL", r"network\.dit\.preset='DiT-XL': expected .* such as 'DiT-XL/2'"),
        ("dit_preset", "DiT-XL/0", r"network\.dit\.preset='DiT-XL/0'"),
        ("uvit_preset", "DiT-S/2", r"network\.uvit\.preset='DiT-S' is unknown"),
    ],
)
def test_unknown_presets_are_named(preset, name, message):
    with pytest.raises(ConfigError, match=message):
        getattr(presets_dit, preset)(name)


def test_presets_hand_out_copies():
    presets_dit.dit_preset("DiT-S/2")["dim"] = 1
    assert presets_dit.dit_preset("DiT-S/4") == {"dim": 384, "depth": 12, "heads": 6, "patch": 4}
