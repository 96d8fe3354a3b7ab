"""U-ViT: long skips, halves scanned or not, tokens of every condition, sizes it refuses."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit, normal

from diffusion_jax.errors import ConfigError
from diffusion_jax.networks import TextConfig, UViT, functional
from diffusion_jax.networks.stacking import stack_blocks, unstack_blocks
from diffusion_jax.parallel.mesh import make_mesh
from diffusion_jax.parallel.sharding import path_name, shardings_for

SMALL = functools.partial(
    UViT,
    (8, 8, 2),
    dim=24,
    depth=5,
    heads=2,
    dropout=0.2,
    num_classes=3,
    scalars=1,
    text=TextConfig(dim=8, depth=1, heads=2),
)


@functools.cache
def params():
    """Random scanned parameters: scales around 1, columns of kernels around unit length."""
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        name = path_name(path)
        spread = 0.8 * leaf.shape[-2] ** -0.5 if name.endswith("kernel") else 0.2
        values = name.endswith("scale") + spread * rng.normal(size=leaf.shape)
        return jnp.asarray(values, jnp.float32)

    abstract = jax.eval_shape(functional(SMALL).init, jax.random.key(0))
    return jax.tree_util.tree_map_with_path(fill, abstract)


def inputs():
    """x, noise and a conditioning with everything; texts of 5, 1, 0 and 3 bytes."""
    text = np.zeros((4, 6), np.int32)
    for row, size in enumerate((5, 1, 0, 3)):
        text[row, :size] = 97 + row + np.arange(size)
    conditioning = {
        "label": jnp.arange(4) % 3,
        "scalar": jnp.linspace(-1.0, 3.0, 4)[:, None],
        "text": jnp.asarray(text),
    }
    return normal(4, 8, 8, 2, seed=1), jnp.arange(4.0), conditioning


@functools.cache
def output_and_gradients(**options):
    """With dropout on; gradients in the layout of the parameters."""
    net = functional(functools.partial(SMALL, **options))
    tree = params() if options.get("scan", True) else jit(unstack_blocks)(params())

    def loss(tree):
        out = net.apply(tree, *inputs(), key=jax.random.key(3), return_features=True)
        return sum(jnp.mean(jnp.sin(leaf)) for leaf in out), out

    (_, out), gradients = jit(jax.value_and_grad(loss, has_aux=True))(tree)
    return out, gradients


@functools.cache
def apply(**options):
    """Output without dropout, of `inputs` with other entries or without some."""
    net = functional(functools.partial(SMALL, **options))

    @functools.partial(jit, static_argnames="drop")
    def run(tree, drop=(), **entries):
        x, noise, conditioning = inputs()
        conditioning = {k: v for k, v in conditioning.items() if k not in drop}
        return net.apply(tree, x, noise, {**conditioning, **entries})

    # All calls give all entries, so that one program serves them; those that drop some none.
    whole = {"text": inputs()[2]["text"], **dict.fromkeys(KEEPS, jnp.ones(4, bool))}

    def call(tree, drop=(), **entries):
        return run(tree, drop, **({} if drop else {**whole, **entries}))

    return call


KEEPS = ("label_keep", "scalar_keep", "text_keep")


def assert_trees_close(a, b, tolerance=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=tolerance, rtol=1e-4), a, b)


@pytest.mark.slow
def test_neither_layout_nor_remat_changes_a_gradient():
    out, gradients = output_and_gradients()
    out2, gradients2 = output_and_gradients(scan=False, remat="full")
    assert_trees_close(out2, out)
    assert_trees_close(jit(stack_blocks)(gradients2), gradients)


def test_stacks_stand_where_the_rules_of_sharding_find_them():
    paths = {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params())}
    assert {path.split("/blocks/")[0] for path in paths if "/blocks/" in path} == {
        "down",
        "middle",
        "up",
        "text/encoder",
    }
    assert {path for path in paths if "skip" in path} == {
        "up/blocks/skip/kernel",
        "up/blocks/skip/bias",
    }
    assert params()["up"]["blocks"]["skip"]["kernel"].shape == (2, 48, 24)


def test_skips_join_mirror_images():
    # The last block is made to forget all but its skip: what then matters before it is the first
    # block alone.
    tree = jax.tree.map(np.array, params())
    tree["up"]["blocks"]["skip"]["kernel"][1] = np.concatenate([np.zeros((24, 24)), np.eye(24)])
    base = apply()(tree)
    for side, block, matters in (("down", 0, 1), ("down", 1, 0), ("middle", 0, 0), ("up", 0, 0)):
        changed = jax.tree.map(np.array, tree)
        changed[side]["blocks"]["mlp"]["fc2"]["bias"][block] += np.arange(24.0)
        distance = np.abs(apply()(changed) - base).max()
        assert (distance > 1e-3) if matters else (distance < 1e-5)


def test_what_is_dropped_is_as_if_absent():
    run = functools.partial(apply(), params())
    keep = jnp.asarray([True, False, False, True])
    given, absent = run(), run(drop=tuple(name.removesuffix("_keep") for name in KEEPS))
    mixed = run(**dict.fromkeys(KEEPS, keep))
    np.testing.assert_allclose(mixed[1:3], absent[1:3], atol=1e-5)
    np.testing.assert_allclose(mixed[::3], given[::3], atol=1e-5)
    for name in KEEPS:
        assert np.abs(given - run(**{name: keep}))[1].max() > 1e-4


def test_padding_of_the_text_changes_nothing():
    run = functools.partial(apply(), params())
    longer = np.pad(inputs()[2]["text"], ((0, 0), (0, 7)))
    np.testing.assert_allclose(run(text=longer), run(), atol=2e-5)


def test_bfloat16_is_near_float32():
    exact, half = apply()(params()), apply(dtype="bfloat16")(params())
    assert half.dtype == jnp.float32
    assert np.abs(half - exact).max() < 0.1 * np.abs(exact).max()


def test_sharded_equals_unsharded():
    net = functional(SMALL)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    shardings = shardings_for(params(), mesh, min_size=64)
    with jax.set_mesh(mesh):
        tree = jax.device_put(params(), shardings)
        got = jit(lambda tree: net.apply(tree, *inputs()))(tree)
    kernel = tree["up"]["blocks"]["attention"]["qkv"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    np.testing.assert_allclose(got, apply()(params()), atol=2e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"positions": "rope", "qk_norm": True, "mlp": "swiglu"},
        {"positions": "sincos", "smooth": False},
        {"depth": 1, "text": None, "scalars": 0},
        {"shape": (16, 3), "patch": 4},
        {"shape": (4, 4, 4, 1), "out_channels": 2, "positions": "rope", "dim": 36},
    ],
)
def test_other_options_give_the_shape(options):
    options = {"shape": (8, 8, 2), **options}
    shape = options.pop("shape")
    net = functional(functools.partial(UViT, shape, **{**SMALL.keywords, **options}))
    tree = jax.eval_shape(net.init, jax.random.key(0))
    out, features = jax.eval_shape(
        functools.partial(net.apply, return_features=True),
        tree,
        jnp.ones((2, *shape)),
        jnp.zeros(2),
        {},
    )
    assert out.shape == (2, *shape[:-1], options.get("out_channels", shape[-1]))
    patches = math.prod(size // options.get("patch", 2) for size in shape[:-1])
    assert features.shape == (2, patches, options.get("dim", 24))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 4}, r"network\.uvit\.depth=4: expected an odd number; nearest: 5"),
        ({"depth": 0}, r"network\.uvit\.depth=0: expected at least 1"),
        ({"dim": 25, "heads": 5}, r"network\.uvit\.dim=25: expected an even number"),
        ({"patch": 3}, r"network\.uvit\.patch=3 does not divide"),
        ({"heads": 5}, r"network\.uvit\.heads=5 does not divide"),
        ({"positions": "sin"}, r"network\.uvit\.positions='sin' is unknown"),
        ({"remat": "all"}, r"network\.uvit\.remat='all' is unknown"),
        ({"mlp": "relu"}, r"network\.uvit\.mlp='relu' is unknown"),
        ({"num_classes": -1}, r"network\.uvit\.num_classes=-1"),
        ({"scalars": -1}, r"network\.uvit\.scalars=-1"),
        ({"out_channels": 0}, r"network\.uvit\.out_channels=0"),
    ],
)
def test_bad_sizes_name_the_field(options, message):
    with pytest.raises(ConfigError, match=message):
        functional(functools.partial(SMALL, **options))
