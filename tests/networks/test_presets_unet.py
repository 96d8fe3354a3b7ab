"""Parameters and multiply-adds of the presets against the published tables.

`count_flops` leaves element-wise work out. EDM2's published figures are multiply-adds with every
element-wise operation counted besides, ADM's likewise: the products alone come
to a little less, and never to more.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from diffusion_jax.errors import ConfigError
from diffusion_jax.networks import EDM2, UNet, presets_unet
from diffusion_jax.parallel.flops import count_flops

LATENTS = (64, 64, 4)


def counts(make, flops=True):
    """Parameters and, for one example, billions of multiply-adds."""
    size, net, state = abstract(make)
    if not flops:
        return size, None
    x = jax.ShapeDtypeStruct((1, *make.args[0]), jnp.float32)
    noise = jax.ShapeDtypeStruct((1,), jnp.float32)
    conditioning = {"label": jax.ShapeDtypeStruct((1,), jnp.int32)}

    def apply(state, *inputs):
        return nnx.merge(net, state)(*inputs)

    return size, count_flops(apply, state, x, noise, conditioning) / 2e9


def abstract(make):
    """Parameters, and both parts of the module, which takes seconds to trace: here once."""
    net, state = nnx.split(nnx.eval_shape(lambda: make(scan=True, rngs=nnx.Rngs(0))))
    return sum(leaf.size for leaf in jax.tree.leaves(state)), net, state


# Karras et al. 2024 (EDM2): model size and cost of an evaluation on latents of ImageNet-512.
@pytest.mark.parametrize(
    ("name", "millions", "billions"),
    [
        ("EDM2-XS", 124.7, 45.5),
        pytest.param("EDM2-S", 280.2, 102.2, marks=pytest.mark.slow),
        pytest.param("EDM2-M", 497.8, 180.8, marks=pytest.mark.slow),
        pytest.param("EDM2-L", 777.5, 282.2, marks=pytest.mark.slow),
        pytest.param("EDM2-XL", 1119.3, 405.9, marks=pytest.mark.slow),
        ("EDM2-XXL", 1523.2, 552.1),
    ],
)
def test_edm2(name, millions, billions):
    options = presets_unet.edm2_preset(name)
    size, multiply_adds = counts(functools.partial(EDM2, LATENTS, num_classes=1000, **options))
    assert round(size / 1e6, 1) == millions
    assert 0.985 * billions < multiply_adds < billions


# Parameters as the training logs of EDM print them, less the 9 x 128 of its augmentation labels,
# which no network here has.
@pytest.mark.parametrize(
    ("name", "side", "logged"), [("DDPM++-64", 64, 61_805_571), ("DDPM++", 32, 55_733_891)]
)
def test_ddpmpp(name, side, logged):
    assert unet_size(name, side) == logged - 9 * 128


@functools.cache
def unet_size(name, side):
    options = presets_unet.unet_preset(name)
    return counts(functools.partial(UNet, (side, side, 3), **options), flops=False)[0]


def test_ncsnpp_adds_a_pyramid_and_wider_noise_features():
    sizes = {name: unet_size(name, 32) for name in ("DDPM++", "NCSN++")}
    pyramid = (9 * 3 * 256 + 256) + (9 * 256 * 256 + 256)
    assert sizes["NCSN++"] - sizes["DDPM++"] == pyramid + 128 * 512
    assert round(sizes["NCSN++"] / 1e6, 1) == 56.4


# Dhariwal & Nichol 2021 (296, 422 and 554 million; variance learned); 295.9 million at 64 and 110.4
# billion operations on latents: Karras et al. 2024, configuration A; 1120 billion: Peebles & Xie.
@pytest.mark.parametrize(
    ("name", "shape", "out_channels", "millions", "billions", "share"),
    [
        ("ADM-64", LATENTS, 4, 295.9, 110.4, 0.94),
        ("ADM-64", (64, 64, 3), 6, 296, None, None),
        pytest.param("ADM-128", (128, 128, 3), 6, 422, None, None, marks=pytest.mark.slow),
        ("ADM-256", (256, 256, 3), 6, 554, 1120, 0.95),
    ],
)
def test_adm(name, shape, out_channels, millions, billions, share):
    options = presets_unet.unet_preset(name)
    make = functools.partial(UNet, shape, num_classes=1000, out_channels=out_channels, **options)
    size, multiply_adds = counts(make, flops=billions is not None)
    assert round(size / 1e6, 1 if isinstance(millions, float) else None) == millions
    if billions is not None:
        assert share * billions < multiply_adds < billions


@pytest.mark.parametrize(
    ("preset", "name", "message"),
    [
        ("unet_preset", "ADM", r"network\.unet\.preset='ADM' is unknown"),
        ("edm2_preset", "EDM2-XXXL", r"network\.edm2\.preset='EDM2-XXXL' .*'EDM2-XXL'"),
    ],
)
def test_unknown_presets_are_named(preset, name, message):
    with pytest.raises(ConfigError, match=message):
        getattr(presets_unet, preset)(name)


def test_presets_hand_out_copies():
    presets_unet.edm2_preset("EDM2-S")["channels"] = 1
    assert presets_unet.edm2_preset("EDM2-S")["channels"] == 192
