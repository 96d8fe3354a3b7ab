"""Structure of the U-Net: where it attends, what sizes it takes, other ranks."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from quick import drawn, jit, normal

from diffusion_jax.errors import ConfigError
from diffusion_jax.networks import TextConfig, UNet, functional
from diffusion_jax.networks.unet_blocks import StageOptions
from diffusion_jax.parallel.mesh import make_mesh
from diffusion_jax.parallel.sharding import path_name, shardings_for

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
    params = drawn(net.init)
    params["head"]["kernel"] = normal(*params["head"]["kernel"].shape, seed=1)
    params["up"]["level1_upsample"]["conv"]["kernel"] *= 0
    out = jit(net.apply)(
        params, jnp.stack([jnp.zeros((4, 4, 1)), jnp.eye(4)[..., None]]), jnp.zeros(2), {}
    )
    assert np.abs(out[0] - out[1]).max() > 1e-2


FULL = functools.partial(
    SMALL,
    (8, 8, 1),
    multipliers=(1, 2),
    attention_resolutions=(4,),
    num_classes=3,
    scalars=2,
    text=TextConfig(dim=8, depth=1, heads=2),
)


@functools.cache
def moved():
    """Parameters off their zero start."""
    return drawn(functional(FULL).init, move=0.1)


def inputs():
    """x, noise and a conditioning with everything; texts of 5, 1, 0 and 3 bytes."""
    text = np.zeros((4, 6), np.int32)
    for row, size in enumerate((5, 1, 0, 3)):
        text[row, :size] = 97 + row + np.arange(size)
    conditioning = {
        "label": jnp.arange(4) % 3,
        "scalar": jnp.linspace(-1.0, 3.0, 8).reshape(4, 2),
        "text": jnp.asarray(text),
    }
    return normal(4, 8, 8, 1, seed=1), jnp.arange(4.0), conditioning


@functools.cache
def applied():
    net = functional(FULL)

    @functools.partial(jit, static_argnames="drop")
    def run(tree, drop, entries):
        x, noise, conditioning = inputs()
        conditioning = {k: v for k, v in conditioning.items() if k not in drop}
        return net.apply(tree, x, noise, {**conditioning, **entries})

    # All calls give both masks, so that one program serves them.
    whole = {"text_keep": jnp.ones(4, bool), "scalar_keep": jnp.ones(4, bool)}
    return lambda **entries: run(moved(), (), {**whole, **entries}), lambda: run(moved(), DROP, {})


DROP = ("text", "scalar")


def test_padding_of_the_text_changes_nothing():
    given, _ = applied()
    text = inputs()[2]["text"]
    base = given(text=text)
    longer = given(text=np.pad(text, ((0, 0), (0, 7))))
    np.testing.assert_allclose(longer, base, atol=2e-5)
    changed = np.array(text)
    changed[0, 4] += 1
    distance = np.abs(given(text=changed) - base).max(axis=(1, 2, 3))
    assert distance[0] > 1e-5
    assert distance[1:].max() < 1e-6


def test_what_is_dropped_is_as_if_absent():
    given, without = applied()
    text, keep = inputs()[2]["text"], jnp.asarray([True, False, False, True])
    whole, absent = given(text=text), without()
    mixed = given(text=text, **{f"{name}_keep": keep for name in DROP})
    np.testing.assert_allclose(mixed[1:3], absent[1:3], atol=1e-5)
    np.testing.assert_allclose(mixed[::3], whole[::3], atol=1e-5)
    for name in DROP:
        one = given(text=text, **{f"{name}_keep": keep})
        np.testing.assert_allclose(one[::3], whole[::3], atol=1e-5)
        assert np.abs(whole - one)[1].max() > 1e-4


def test_text_is_read_where_there_is_attention_and_with_the_noise():
    net = functional(FULL)
    tree = jax.eval_shape(net.init, jax.random.key(0))
    assert tree["up"]["level1_0"]["attention"]["cross"]["kv"]["kernel"].shape == (8, 32)
    assert tree["text"]["pool"]["kernel"].shape == (8, 32)
    with pytest.raises(ValueError, match="this network reads bytes"):
        jax.eval_shape(net.apply, tree, *inputs()[:2], {"text": jnp.zeros((4, 2, 8))})
    with pytest.raises(ValueError, match=r"scalar has shape \(4, 3\)"):
        jax.eval_shape(net.apply, tree, *inputs()[:2], {"scalar": jnp.zeros((4, 3))})


def stacked(tree, plan):
    """Parameters of the unscanned layout in the scanned one."""
    out = dict(tree)
    for side in ("down", "up"):
        parts = dict(tree[side])
        for part in getattr(plan, side):
            if part.depth > 1:
                level, first = part.name.split("_")
                names = [f"{level}_{int(first) + i}" for i in range(part.depth)]
                alike = [parts.pop(name) for name in names]
                parts[part.name] = {"blocks": jax.tree.map(lambda *a: jnp.stack(a), *alike)}
        out[side] = parts
    return out


@pytest.mark.slow
def test_neither_scan_nor_remat_changes_a_gradient():
    make = functools.partial(
        SMALL, (4, 4, 1), multipliers=(1, 2), blocks=3, dropout=0.3, encoder="residual"
    )
    scanned = functools.partial(make, scan=True, remat="full")
    plan = nnx.eval_shape(lambda: scanned(rngs=nnx.Rngs(0))).plan
    assert [part.depth for part in plan.up] == [3, 1, 1, 1, 3]
    tree = drawn(functional(make).init, move=0.1)
    x = normal(2, 4, 4, 1, seed=1)

    def gradients(make, tree):
        net = functional(make)

        def loss(tree):
            out = net.apply(tree, x, jnp.arange(2.0), {}, key=jax.random.key(2))
            return jnp.mean(jnp.sin(out))

        return jit(jax.grad(loss))(tree)

    one = stacked(gradients(make, tree), plan)
    two = gradients(scanned, stacked(tree, plan))
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(one))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, atol=1e-4 * largest), one, two)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [True, False])
def test_sharded_equals_unsharded(scan):
    # Stacked blocks have tensor rules and single ones none: here they stand beside each other.
    options: Any = {"attention_resolutions": (2,), "num_classes": 3, "blocks": 2, "scan": scan}
    text = TextConfig(dim=8, depth=1, heads=2)
    make = functools.partial(SMALL, (4, 4, 1), multipliers=(1, 2), text=text, **options)
    net = functional(make)
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        name = path_name(path)
        spread = np.prod(leaf.shape[-4:-1]) ** -0.5 if name.endswith("kernel") else 0.2
        return np.float32(name.endswith("scale") + spread * rng.normal(size=leaf.shape))

    tree = jax.eval_shape(net.init, jax.random.key(0))
    tree = jax.tree_util.tree_map_with_path(fill, tree)
    _, noise, conditioning = inputs()
    x = normal(4, 4, 4, 1, seed=1)

    def loss(tree):
        out = net.apply(tree, x, noise, {k: conditioning[k] for k in ("label", "text")})
        return jnp.mean(jnp.sin(out)), out

    step = jax.value_and_grad(loss, has_aux=True)
    (_, out), gradients = jit(step)(tree)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    shardings = shardings_for(tree, mesh, min_size=64)
    with jax.set_mesh(mesh):
        placed = jax.device_put(tree, shardings)
        (_, out2), gradients2 = jit(step, out_shardings=(None, shardings))(placed)
    if scan:
        stack = placed["up"]["level1_0"]["blocks"]
        for layer in (stack["residual"]["conv2"], stack["attention"]["cross"]["q"]):
            kernel = layer["kernel"]
            assert kernel.addressable_shards[0].data.size == kernel.size // 4
    np.testing.assert_allclose(out2, out, atol=2e-5)
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(gradients))
    for (path, one), two in zip(
        jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(gradients2), strict=True
    ):
        np.testing.assert_allclose(two, one, atol=1e-4 * largest, err_msg=path_name(path))


OPTIONS = [
    {"scale_shift": False, "rescale_skips": True},
    {"resample": "block", "resampling": "fir", "encoder": "residual"},
    {"resampling": "fir", "noise_embedding": "fourier", "noise_features": 6},
    {"resample": "block", "resample_projection": True, "blocks": (1, 2), "up_attention": "last"},
]


@pytest.mark.parametrize(
    "options", [*(pytest.param(o, marks=pytest.mark.slow) for o in OPTIONS[:3]), OPTIONS[3]]
)
def test_options_change_the_output_and_train_every_part(options):
    make = functools.partial(SMALL, (4, 4, 1), multipliers=(1, 2), **options)
    net = functional(make)
    tree = drawn(net.init, move=0.1)
    x = normal(2, 4, 4, 1, seed=1)
    for path, gradient in jax.tree_util.tree_leaves_with_path(
        jit(jax.grad(lambda t: jnp.mean((net.apply(t, x, jnp.arange(2.0), {}) - 1) ** 2)))(tree)
    ):
        assert np.abs(gradient).max() > 0, jax.tree_util.keystr(path)


def test_rescaled_residual_block_keeps_the_variance_of_independent_branches():
    options = StageOptions(rank=2, condition=8, rescale_skips=True)
    a, b = normal(100_000), normal(100_000, seed=1)
    assert float(jnp.std(options.join(a, b))) == pytest.approx(1.0, abs=0.01)


def test_attention_after_the_last_block_alone_on_the_way_up():
    names = attended(shape=(32, 32, 3), blocks=2, up_attention="last")
    level1 = {"down/level1_0", "down/level1_1", "up/level1_2"}
    assert names == level1 | {"middle/0"}
    with pytest.raises(ConfigError, match=r"network\.unet\.blocks=\(1, 2\): expected one number"):
        abstract(shape=(32, 32, 3), blocks=(1, 2))
    with pytest.raises(ConfigError, match=r"network\.unet\.resampling='fur' is unknown .*'fir'"):
        abstract(shape=(32, 32, 3), resampling="fur")
