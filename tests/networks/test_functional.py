"""What every network promises: a plain tree, purity, conditioning, dtypes, keys, zero start."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from quick import drawn, jit, normal

from diffusion_jax.networks import EDM2, MLP, DiT, UNet, UViT, functional

UNET = functools.partial(
    UNet, (4, 4, 1), channels=8, multipliers=(1, 2), blocks=1, attention_resolutions=()
)
SMALL_EDM2 = functools.partial(
    EDM2,
    (4, 4, 1),
    channels=8,
    multipliers=(1, 2),
    blocks=1,
    attention_resolutions=(),
    head_dim=8,
)
CASES = {
    "edm2": ((4, 4, 1), SMALL_EDM2),
    "mlp": ((5,), functools.partial(MLP, (5,), width=32, depth=2)),
    "unet": ((4, 4, 1), UNET),
    "dit": ((4, 4, 1), functools.partial(DiT, (4, 4, 1), dim=32, depth=2, heads=2)),
    "uvit": ((4, 4, 1), functools.partial(UViT, (4, 4, 1), dim=32, depth=3, heads=2)),
}


@functools.cache
def initial_params(name):
    net = functional(functools.partial(CASES[name][1], num_classes=4))
    return drawn(net.init, unit=name == "edm2")


@functools.cache
def moved_params(name):
    """Parameters off their zero start; no option used here changes their shapes."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda a: a + 0.05 * rng.normal(size=a.shape).astype(np.float32), initial_params(name)
    )


@functools.cache
def built(name, **options):
    """Shape, network, parameters and compiled apply."""
    shape, make = CASES[name]
    net = functional(functools.partial(make, num_classes=4, **options))
    return shape, net, moved_params(name), jit(net.apply)


def inputs(shape):
    return normal(8, *shape, seed=1), jnp.linspace(-3.0, 3.0, 8)


def labelled(label=None, keep=None):
    """A conditioning; all of one structure, so that one program serves them."""
    label, keep = (np.arange(8) % 4 if label is None else label), (keep or [True] * 8)
    return {"label": jnp.asarray(label, jnp.int32), "label_keep": jnp.asarray(keep)}


@pytest.mark.parametrize("name", CASES)
def test_parameters_are_a_plain_float32_tree_whatever_the_compute_dtype(name):
    shape, make = CASES[name]
    net = functional(functools.partial(make, dtype="bfloat16"))
    tree = jax.eval_shape(net.init, jax.random.key(0))
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        assert leaf.dtype == jnp.float32
        assert all(type(entry) is jax.tree_util.DictKey for entry in path)
        assert all(type(entry.key) is str for entry in path)
    out = jax.eval_shape(net.apply, tree, *inputs(shape), {})
    assert (out.shape, out.dtype) == ((8, *shape), jnp.float32)


@pytest.mark.parametrize("name", CASES)
def test_output_starts_at_zero(name):
    shape, _, _, apply = built(name)
    out = apply(initial_params(name), *inputs(shape), labelled())
    np.testing.assert_array_equal(out, np.zeros((8, *shape)))


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_and_input_matters(name):
    shape, net, params, _ = built(name)
    x, noise = inputs(shape)
    conditioning = labelled(keep=[True, True, False, True] * 2)

    @jit
    def gradients(params, x, noise):
        def loss(params, x, noise):
            return jnp.mean(jnp.square(net.apply(params, x, noise, conditioning) - 1.0))

        return jax.grad(loss, (0, 1, 2))(params, x, noise)

    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients(params, x, noise)):
        assert np.abs(gradient).max() > 0, jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", CASES)
def test_dropped_label_is_the_missing_label(name):
    shape, _, params, apply = built(name)
    x, noise = inputs(shape)
    run = functools.partial(apply, params, x, noise)
    label, keep = np.arange(8) % 4, [True, False] * 4
    absent, kept, mixed = run({}), run(labelled()), run(labelled(keep=keep))
    other = run(labelled(np.where(keep, label, 3 - label), keep))
    np.testing.assert_array_equal(mixed, other)
    np.testing.assert_allclose(mixed[1::2], absent[1::2], atol=1e-5)
    np.testing.assert_allclose(mixed[::2], kept[::2], atol=1e-5)
    assert np.abs(kept - absent).max(axis=tuple(range(1, x.ndim))).min() > 1e-4
    swapped = run(labelled(label[::-1]))
    assert np.abs(kept - swapped).max(axis=tuple(range(1, x.ndim))).min() > 1e-4


def test_what_has_no_mask_is_kept():
    shape, make = CASES["mlp"]
    net = functional(functools.partial(make, num_classes=4, scalars=2))
    run = functools.partial(jit(net.apply), drawn(net.init, move=0.1), *inputs(shape))
    given = {"label": labelled()["label"], "scalar": normal(8, 2, seed=2)}
    keep = jnp.ones(8, bool)
    masked = run({**given, "label_keep": keep, "scalar_keep": keep})
    np.testing.assert_allclose(run(given), masked, atol=1e-5)
    dropped = run({**given, "label_keep": keep, "scalar_keep": ~keep})
    assert np.abs(dropped - masked).max() > 1e-3


def test_label_out_of_range_is_loud_where_it_is_kept():
    shape, _, params, apply = built("mlp")
    x, noise = inputs(shape)
    out = apply(params, x, noise, labelled([0, 4, -1, 9] * 2, [True, True, True, False] * 2))
    np.testing.assert_array_equal(np.isnan(out).all(axis=1), [False, True, True, False] * 2)


@pytest.mark.parametrize("name", CASES)
def test_examples_do_not_see_each_other(name):
    shape, _, params, apply = built(name)
    x, noise = (np.array(a) for a in inputs(shape))
    whole = apply(params, x, noise, labelled())
    label = np.arange(8) % 4
    x[3:], noise[3:], label[3:] = 5 - x[3:], -noise[3:], 3 - label[3:]
    beside_others = apply(params, x, noise, labelled(label))
    np.testing.assert_allclose(beside_others[:3], whole[:3], atol=2e-5)
    assert np.abs(beside_others - whole)[3:].max() > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_dropout_needs_a_key_and_follows_it(name):
    shape, net, params, apply = built(name, dropout=0.4)
    x, noise = inputs(shape)
    run = functools.partial(apply, params, x, noise, labelled())
    keys = jax.random.split(jax.random.key(0), 8)
    # Without a key nothing is drawn.
    draws = [
        str(jax.make_jaxpr(functools.partial(net.apply, key=key))(params, x, noise, {})).count(
            "random_bits"
        )
        for key in (None, keys[0])
    ]
    assert draws[0] == 0 < draws[1]
    without = built(name)[3](params, x, noise, labelled())
    np.testing.assert_array_equal(run(key=keys[0]), run(key=keys[0]))
    assert not np.allclose(run(key=keys[0]), run(key=keys[1]), atol=1e-3)
    assert not np.allclose(run(key=keys[0]), without, atol=1e-3)
    each = run(key=keys)
    changed = run(key=keys.at[0].set(jax.random.key(9)))
    np.testing.assert_allclose(each[1:], changed[1:], atol=1e-5)
    assert not np.allclose(each[0], changed[0], atol=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_compute_stays_near_float32(name):
    shape, _, params, apply = built(name)
    _, _, _, half = built(name, dtype="bfloat16")
    x, noise = inputs(shape)
    want = apply(params, x, noise, labelled())
    got = half(params, x, noise, labelled())
    assert got.dtype == jnp.float32
    error = np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2))
    assert 0 < error < 0.05


def test_noise_inputs_that_name_one_level_agree():
    # c_noise is -logsnr / 8, a timestep 1000 t: the same level in another unit, the same output.
    shape, _, params, apply = built("mlp")
    x, noise = inputs(shape)
    _, _, _, c_noise = built("mlp", noise_input="c_noise")
    flipped = c_noise(params, x, noise / 8, labelled())
    np.testing.assert_allclose(flipped, apply(params, x, noise, labelled()), atol=2e-3)
    _, timestep, _, _ = built("mlp", noise_input="timestep")
    _, t, _, _ = built("mlp", noise_input="t")
    by_step = jit(timestep.apply)(params, x, 1000 * jnp.linspace(0, 1, 8), {})
    by_time = jit(t.apply)(params, x, jnp.linspace(0, 1, 8), {})
    np.testing.assert_allclose(by_time, by_step, atol=2e-3)
    assert (t.noise_input, timestep.noise_input) == ("t", "timestep")


@pytest.mark.parametrize("name", CASES)
def test_eight_devices_give_the_single_device_result(name):
    shape, net, params, apply = built(name)
    x, noise = inputs(shape)
    conditioning = labelled()
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), (jax.sharding.AxisType.Auto,) * 2)
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp")))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with jax.set_mesh(mesh):
        sharded = jit(net.apply, in_shardings=(whole, split, split, split))(
            params, *jax.device_put((x, noise, conditioning), split)
        )
    assert sharded.sharding.spec[0] == ("data", "fsdp")
    np.testing.assert_allclose(sharded, apply(params, x, noise, conditioning), atol=2e-5)


def test_initialisation_can_be_born_sharded():
    _, net, _, _ = built("mlp")
    mesh = jax.make_mesh((8,), ("fsdp",), (jax.sharding.AxisType.Auto,))
    tree = jax.eval_shape(net.init, jax.random.key(0))
    shardings = jax.tree.map(
        lambda a: jax.sharding.NamedSharding(
            mesh, jax.sharding.PartitionSpec("fsdp" if a.shape[0] % 8 == 0 else None)
        ),
        tree,
    )
    params = jit(net.init, out_shardings=shardings)(jax.random.key(3))
    kernel = params["layers"]["0"]["fc1"]["kernel"]
    assert kernel.addressable_shards[0].data.shape[0] == kernel.shape[0] // 8
    plain = jit(net.init)(jax.random.key(3))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, plain)


def test_apply_is_pure_under_vmap_and_repeated_tracing():
    shape, net, params, apply = built("mlp")
    x, noise = inputs(shape)
    pair = jax.tree.map(lambda a: np.stack([a, 2 * a]), params)
    outs = jit(jax.vmap(lambda p: net.apply(p, x, noise, labelled())))(pair)
    np.testing.assert_allclose(outs[0], apply(params, x, noise, labelled()), atol=1e-5)
    assert not np.allclose(outs[1], outs[0], atol=1e-3)
    with pytest.raises(ValueError, match=r"examples of shape \(6,\).*takes \(5,\)"):
        jax.eval_shape(net.apply, params, jnp.ones((8, 6)), noise, {})


def test_modules_with_hidden_state_or_list_keys_are_refused():
    class Stateful(nnx.Module):
        def __init__(self, *, rngs: nnx.Rngs):
            self.noise_input = "t"
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

    class Listed(nnx.Module):
        def __init__(self, *, rngs: nnx.Rngs):
            self.noise_input = "t"
            self.parts = nnx.List([nnx.Linear(2, 2, rngs=rngs)])

    class Half(nnx.Module):
        def __init__(self, *, rngs: nnx.Rngs):
            self.noise_input = "t"
            self.scale = nnx.Param(jnp.ones(2, jnp.bfloat16))

    with pytest.raises(ValueError, match="parameters alone"):
        functional(Stateful)
    with pytest.raises(ValueError, match="not a string"):
        functional(Listed)
    with pytest.raises(ValueError, match="scale has dtype bfloat16; expected float32"):
        functional(Half)


@pytest.mark.parametrize("name", CASES)
def test_every_dropout_has_a_key_of_its_own(name, monkeypatch):
    shape, make = CASES[name]
    seen = []

    def spy(x, rate, key):
        seen.append(jax.random.key_data(key))
        return x

    where = {"dit": "blocks", "uvit": "blocks", "unet": "unet_blocks"}.get(name, name)
    monkeypatch.setattr(f"diffusion_jax.networks.{where}.dropout", spy)
    unrolled = {} if name == "mlp" else {"scan": False}
    net = functional(functools.partial(make, dropout=0.5, **unrolled))

    tree = jax.eval_shape(net.init, jax.random.key(0))
    tree = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), tree)

    @jit
    def keys():
        net.apply(jax.tree.map(jnp.asarray, tree), *inputs(shape), {}, key=jax.random.key(1))
        return jnp.stack(seen)

    expected = {"edm2": 10, "mlp": 2, "unet": 8, "dit": 4, "uvit": 6}
    assert len(np.unique(keys(), axis=0)) == expected[name]
