"""The multi-scale network: shapes, zero start, what time may do, what shifts do, bad sizes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from quick import drawn, jit, normal, run

from diffusion_jax.errors import ConfigError
from diffusion_jax.networks import MLP, MultiScale, functional
from diffusion_jax.networks.multiscale import MultiScaleConv

SMALL = {"channels": 4, "layers": 2, "dense_channels": 6, "bumps": 4}


def build(shape=(8, 8, 1), **options):
    return functional(functools.partial(MultiScale, shape, **{**SMALL, **options}))


def randomised(net):
    params = drawn(net.init)
    params["head"]["kernel"] = normal(*params["head"]["kernel"].shape, seed=7)
    return params


def test_shape_and_zero_start():
    net = build(full_width=5, out_channels=3)
    assert net.noise_input == "t"
    params = jit(net.init)(jax.random.key(0))
    out = jit(net.apply)(params, jnp.ones((2, 8, 8, 1)), jnp.full(2, 0.3), {})
    assert out.shape == (2, 8, 8, 3)
    assert out.dtype == jnp.float32
    assert not out.any()
    layers = params["layers"]["0"]["scales"]
    assert sorted(layers) == ["0", "1", "2"]
    assert layers["2"]["kernel"].shape == (3, 3, 1, 4)
    volume = jax.eval_shape(build((4, 4, 4, 2)).init, jax.random.key(0))
    assert volume["layers"]["0"]["scales"]["0"]["kernel"].shape == (3, 3, 3, 2, 4)


def test_time_has_as_many_degrees_of_freedom_as_bumps_and_does_not_touch_the_features():
    net = build()
    params, count = randomised(net), 30
    x = normal(1, 8, 8, 1, seed=1)
    many = jnp.broadcast_to(x, (count, 8, 8, 1))
    out = run(net.apply, params, many, jnp.linspace(0.0, 1.0, count), {}).reshape(count, -1)
    values = np.linalg.svd(np.asarray(out, np.float64), compute_uv=False)
    assert values[3] > 1e-3 * values[0]
    assert values[4] < 1e-5 * values[0]
    # The coefficients of one are all of its output at one bump, whatever the time.
    single = build(bumps=1)
    out = run(single.apply, randomised(single), many, jnp.linspace(0.0, 1.0, count), {})
    np.testing.assert_allclose(out, jnp.broadcast_to(out[:1], out.shape), atol=1e-6)


@pytest.mark.parametrize(("scales", "shift"), [(1, 1), (3, 4)])
def test_a_layer_commutes_with_shifts_by_its_coarsest_scale(scales, shift):
    layer = MultiScaleConv(1, 2, rank=2, scales=scales, size=3, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = jnp.zeros((1, 32, 32, 1)).at[:, 12:20, 12:20].set(normal(1, 8, 8, 1))
    moved = layer(jnp.roll(x, shift, axis=(1, 2)))
    np.testing.assert_allclose(moved, jnp.roll(layer(x), shift, axis=(1, 2)), atol=1e-5)
    # The coarsest scale reaches as far as its kernel: pixels beyond see nothing.
    reach = np.abs(np.asarray(layer(x)[0, ..., 0])).max(1) > 1e-6
    margin = 2 ** (scales - 1)
    assert reach.nonzero()[0].min() == 12 - margin
    if scales > 1:
        other = jnp.roll(layer(x), 1, axis=(1, 2))
        assert not np.allclose(layer(jnp.roll(x, 1, axis=(1, 2))), other, atol=1e-3)


def test_labels_and_their_null():
    net = build(num_classes=3)
    params = randomised(net)
    x, t = jnp.zeros((3, 8, 8, 1)), jnp.full(3, 0.5)
    label = jnp.array([0, 1, 1])
    keep = jnp.array([True, True, False])
    out = run(net.apply, params, x, t, {"label": label, "label_keep": keep})
    null = run(net.apply, params, x, t, {})
    assert not np.allclose(out[0], out[1])
    np.testing.assert_allclose(out[2], null[2], atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": 5}, r"network\.multiscale\.scales=5: 8x8 cannot be halved 4 times; nearest: 4"),
        ({"kernel": 4}, r"network\.multiscale\.kernel=4: expected an odd size"),
        ({"noise_input": "logsnr"}, r"network\.noise_input='logsnr': .* expected 't'"),
        ({"scalars": 2}, "'multiscale': it reads no numbers"),
        ({"bumps": 0}, r"network\.multiscale\.bumps=0: expected at least 1"),
        ({"layers": -1}, r"network\.multiscale\.layers=-1"),
        ({"dropout": 1.0}, r"network\.multiscale\.dropout=1\.0"),
        ({"shape": (2,)}, r"network\.multiscale\.shape=\(2,\): .* vectors take the mlp"),
    ],
)
def test_bad_sizes_name_the_field(options, message):
    with pytest.raises(ConfigError, match=message):
        build(**options)


def test_the_perceptron_puts_out_several_numbers_for_each_of_an_example():
    net = functional(functools.partial(MLP, (3, 2), width=8, depth=1, outputs=2))
    params = jax.eval_shape(net.init, jax.random.key(0))
    out = jax.eval_shape(net.apply, params, jnp.ones((5, 3, 2)), jnp.ones(5), {})
    assert out.shape == (5, 3, 4)
    with pytest.raises(ConfigError, match=r"network\.mlp\.outputs=0"):
        functional(functools.partial(MLP, (2,), outputs=0))
