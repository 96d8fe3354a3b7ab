"""The transformer: scanned against unrolled, remat, patches, positions, bad sizes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import drawn, jit, normal

from diffusion_jax.errors import ConfigError
from diffusion_jax.networks import DiT, TextConfig, functional, patches
from diffusion_jax.networks.stacking import stack_blocks, unstack_blocks
from diffusion_jax.parallel.mesh import make_mesh
from diffusion_jax.parallel.sharding import path_name, shardings_for

SMALL = functools.partial(DiT, (8, 8, 2), dim=24, depth=2, heads=2, num_classes=3, dropout=0.2)

TEXT = TextConfig(dim=8, depth=1, heads=2)
# Every option that adds parts, each in one of two networks.
FULL = {
    "plain": {},
    "cross": {
        "text": TEXT,
        "scalars": 2,
        "positions": "rope",
        "qk_norm": True,
        "mlp": "swiglu",
        "registers": 2,
        "features_after": 1,
    },
    "in_context": {
        "text": TEXT,
        "text_by": "in_context",
        "registers": 3,
        "bottleneck": 5,
        "positions": "learned",
    },
}


@functools.cache
def params(kind="plain"):
    """Scanned parameters off their zero start; filled in here, which no compile is needed for."""
    net = functional(functools.partial(SMALL, **FULL[kind]))
    return filled(jax.eval_shape(net.init, jax.random.key(0)))


def filled(abstract):
    """Random parameters: scales around 1, columns of kernels around unit length."""
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        name = path_name(path)
        spread = 0.8 * leaf.shape[-2] ** -0.5 if name.endswith("kernel") else 0.2
        values = name.endswith("scale") + spread * rng.normal(size=leaf.shape)
        return jnp.asarray(values, jnp.float32)

    return jax.tree_util.tree_map_with_path(fill, abstract)


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
    return normal(4, 8, 8, 2, seed=1), jnp.arange(4.0), conditioning


def loss_and_output(net, tree, features=False):
    """With dropout on."""
    out = net.apply(tree, *inputs(), key=jax.random.key(3), return_features=features)
    return sum(jnp.mean(jnp.sin(leaf)) for leaf in jax.tree.leaves(out)), out


@functools.cache
def output_and_gradients(kind="plain", **options):
    """Gradients in the layout of the parameters."""
    net = functional(functools.partial(SMALL, **FULL[kind], **options))
    tree = params(kind) if options.get("scan", True) else jit(unstack_blocks)(params(kind))
    loss = functools.partial(loss_and_output, net, features="features_after" in FULL[kind])
    (_, out), gradients = jit(jax.value_and_grad(loss, has_aux=True))(tree)
    return out, gradients


def assert_trees_close(a, b, tolerance=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=tolerance, rtol=1e-4), a, b)


def test_converting_layouts_is_exact_and_matches_the_unrolled_network():
    unrolled = jit(unstack_blocks)(params())
    assert_trees_close(jit(stack_blocks)(unrolled), params(), 0)
    want = jax.eval_shape(functional(functools.partial(SMALL, scan=False)).init, jax.random.key(0))
    assert jax.tree.map(lambda a: a.shape, unrolled) == jax.tree.map(lambda a: a.shape, want)


def test_both_layouts_start_from_the_same_weights():
    scanned = jit(functional(SMALL).init)(jax.random.key(5))
    unrolled = jit(functional(functools.partial(SMALL, scan=False)).init)(jax.random.key(5))
    assert_trees_close(jit(stack_blocks)(unrolled), scanned, 1e-6)
    kernel = scanned["blocks"]["mlp"]["fc1"]["kernel"]
    assert not np.allclose(kernel[0], kernel[1])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param("cross", {"scan": False}, marks=pytest.mark.slow),
        pytest.param("cross", {"remat": "full"}, marks=pytest.mark.slow),
        ("in_context", {"remat": "dots", "scan": False}),
    ],
)
def test_neither_layout_nor_remat_changes_a_gradient(kind, options):
    out, gradients = output_and_gradients(kind)
    out2, gradients2 = output_and_gradients(kind, **options)
    assert_trees_close(out2, out)
    if "scan" in options:
        gradients2 = jit(stack_blocks)(gradients2)
    assert_trees_close(gradients2, gradients)


@pytest.mark.parametrize("kind", ["cross", "in_context"])
def test_every_part_is_trained(kind):
    _, gradients = output_and_gradients(kind)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        # The nulls of label and numbers are not in use here; the third text is empty.
        unused = path_name(path) in ("condition/label/null", "condition/scalar/null")
        assert (np.abs(leaf).max() == 0) == unused, path_name(path)


def saved_for_backward(remat):
    """Entries kept from the forward for the backward pass, parameters aside."""
    net = functional(functools.partial(SMALL, dropout=0.0, remat=remat))
    x = jax.ShapeDtypeStruct((4, 8, 8, 2), jnp.float32)
    noise = jax.ShapeDtypeStruct((4,), jnp.float32)

    def residuals(tree, x, noise):
        return jax.vjp(lambda tree: net.apply(tree, x, noise, {}), tree)[1]

    kept = jax.eval_shape(residuals, params(), x, noise)
    return sum(leaf.size for leaf in jax.tree.leaves(kept))


def test_remat_keeps_less_for_the_backward_pass():
    none, dots, full = map(saved_for_backward, ("none", "dots", "full"))
    assert full < dots < none


@functools.cache
def applied(kind, **options):
    """Output without dropout for entries that stand in for those of `inputs`, or `drop` some."""
    net = functional(functools.partial(SMALL, **{**FULL[kind], **options}))

    @functools.partial(jit, static_argnames="drop")
    def run(tree, drop=(), **entries):
        x, noise, conditioning = inputs()
        conditioning = {k: v for k, v in conditioning.items() if k not in drop}
        return net.apply(tree, x, noise, {**conditioning, **entries})

    # All calls give all entries, so that one program serves them; those that drop some none.
    whole = {"text": inputs()[2]["text"], **dict.fromkeys(KEEPS[kind], jnp.ones(4, bool))}

    def call(tree=None, drop=(), **entries):
        return run(tree or params(kind), drop, **({} if drop else {**whole, **entries}))

    return call


KEEPS = {"cross": ("text_keep", "scalar_keep"), "in_context": ("text_keep",)}


@pytest.mark.parametrize("kind", ["cross", "in_context"])
def test_padding_of_the_text_changes_nothing(kind):
    text = inputs()[2]["text"]
    base = applied(kind)()
    longer = applied(kind)(text=np.pad(text, ((0, 0), (0, 7))))
    np.testing.assert_allclose(longer, base, atol=2e-5)
    changed = np.array(text)
    changed[0, 4] += 1
    distance = np.abs(applied(kind)(text=changed) - base).max(axis=(1, 2, 3))
    assert distance[0] > 1e-4
    assert distance[1:].max() < 1e-6


@pytest.mark.parametrize("kind", ["cross", "in_context"])
def test_what_is_dropped_is_as_if_absent(kind):
    absent = applied(kind)(drop=tuple(name.removesuffix("_keep") for name in KEEPS[kind]))
    keep = jnp.asarray([True, False, False, True])
    given = applied(kind)()
    mixed = applied(kind)(**dict.fromkeys(KEEPS[kind], keep))
    np.testing.assert_allclose(mixed[1:3], absent[1:3], atol=1e-5)
    np.testing.assert_allclose(mixed[::3], given[::3], atol=1e-5)
    for name in KEEPS[kind]:
        one = applied(kind)(**{name: keep})
        assert np.abs(given - one)[1].max() > 1e-4


def test_ways_of_the_text_differ_in_their_parts():
    def names(**options):
        net = functional(functools.partial(SMALL, text=TEXT, **options))
        tree = jax.eval_shape(net.init, jax.random.key(0))
        return {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}

    cross, in_context = names(), names(text_by="in_context")
    assert in_context < cross
    assert {name.split("/")[1] for name in cross - in_context} == {"cross", "cross_norm"}


def sizes(**options):
    net = functional(functools.partial(DiT, (8, 8, 3), dim=24, depth=2, heads=2, **options))
    tree = jax.eval_shape(net.init, jax.random.key(0))
    return {path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_swiglu_has_as_many_parameters():
    gelu, swiglu = sizes(), sizes(mlp="swiglu")
    names = {name for name in swiglu if "/mlp/" in name and name.endswith("kernel")}
    assert {name: swiglu[name][1:] for name in names} == {
        "blocks/mlp/fc1/kernel": (24, 64),
        "blocks/mlp/gate_fc1/kernel": (24, 64),
        "blocks/mlp/fc2/kernel": (64, 24),
    }
    assert gelu["blocks/mlp/fc1/kernel"] == (2, 24, 96)
    assert 3 * 64 == 2 * 96


def test_bottleneck_and_registers_have_the_sizes_they_are_given():
    plain, narrow = sizes(patch=4), sizes(patch=4, bottleneck=7, registers=5)
    assert plain["stem/kernel"] == (48, 24)
    new = {name: shape for name, shape in narrow.items() if plain.get(name) != shape}
    assert new == {"bottleneck/kernel": (48, 7), "stem/kernel": (7, 24), "registers": (5, 24)}


def test_registers_change_the_patches():
    tree = params("cross")
    moved = {**tree, "registers": tree["registers"][::-1] * 2}
    assert np.abs(applied("cross")(moved) - applied("cross")()).max() > 1e-3


def test_features_are_those_of_the_named_block():
    net = functional(functools.partial(SMALL, **FULL["cross"]))  # features after 1 of 2 blocks
    apply = jit(functools.partial(net.apply, return_features=True))
    tree, x = params("cross"), inputs()
    _, features = apply(tree, *x)
    assert (features.shape, features.dtype) == ((4, 16, 24), jnp.float32)
    for block, matters in enumerate((True, False)):
        changed = jax.tree.map(lambda a: np.array(a), tree)
        changed["blocks"]["mlp"]["fc2"]["bias"][block] += 1
        assert (np.abs(apply(changed, *x)[1] - features).max() > 1e-3) == matters
    with pytest.raises(ConfigError, match=r"network\.dit\.features_after=0: .* 1 to 2"):
        jax.eval_shape(
            functools.partial(functional(SMALL).apply, return_features=True), params(), *inputs()
        )


@pytest.mark.parametrize("kind", ["cross", "in_context"])
def test_bfloat16_is_near_float32(kind):
    exact, half = applied(kind)(), applied(kind, dtype="bfloat16")()
    assert half.dtype == jnp.float32
    assert np.abs(half - exact).max() < 0.1 * np.abs(exact).max()


def test_sharded_equals_unsharded():
    net = functional(functools.partial(SMALL, **FULL["cross"]))
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    # A small threshold, so that these small parameters are split at all.
    shardings = shardings_for(params("cross"), mesh, min_size=64)
    loss = functools.partial(loss_and_output, net, features=True)
    step = jax.value_and_grad(loss, has_aux=True)
    with jax.set_mesh(mesh):
        tree = jax.device_put(params("cross"), shardings)
        (_, out), gradients = jit(step, out_shardings=(None, shardings))(tree)
    kernel = tree["blocks"]["attention"]["qkv"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    assert_trees_close((out, gradients), output_and_gradients("cross"), 2e-5)


@pytest.mark.parametrize("positions", ["sincos", "learned"])
def test_positions_tell_equal_patches_apart(positions):
    net = functional(functools.partial(SMALL, positions=positions, out_channels=3))
    tree = drawn(net.init, move=0.1)
    assert ("positions" in tree) == (positions == "learned")
    out = jit(net.apply)(tree, jnp.ones((1, 8, 8, 2)), jnp.zeros(1), {})
    assert out.shape == (1, 8, 8, 3)
    tokens = patches.to_patches(out, 2)[0]
    assert len(np.unique(tokens.round(4), axis=0)) == 16


def test_rotary_positions_alone_know_where_patches_stand():
    x, noise, _ = inputs()
    net = functional(functools.partial(SMALL, positions="rope"))

    @jit
    def apply(tokens):
        x = patches.from_patches(tokens, (4, 4), 2, 2)
        return patches.to_patches(net.apply(params(), x, noise, {}), 2)

    tokens = patches.to_patches(x, 2)
    reverse, columns = np.arange(16)[::-1], np.arange(16).reshape(4, 4)[:, [1, 0, 2, 3]].ravel()
    # Only offsets are known, but those along every axis.
    for order in (reverse, columns, columns.reshape(4, 4).T.ravel()):
        assert np.abs(apply(tokens[:, order]) - apply(tokens)[:, order]).max() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": 3}, r"network\.dit\.patch=3 does not divide .*8.*; nearest: 2"),
        ({"patch": 0}, r"network\.dit\.patch=0"),
        ({"heads": 5}, r"network\.dit\.heads=5 does not divide network\.dit\.dim \(24\); nearest"),
        ({"dim": 26, "heads": 2}, r"network\.dit\.dim=26: sincos positions .* multiple of 4"),
        ({"depth": 0}, r"network\.dit\.depth=0: expected at least 1"),
        ({"remat": "dot"}, r"network\.dit\.remat='dot' is unknown \(did you mean 'dots'\?\)"),
        ({"attention": "flash"}, r"network\.dit\.attention='flash' is unknown"),
        ({"positions": "rop"}, r"network\.dit\.positions='rop' is unknown .*'rope'"),
        ({"positions": "rope", "heads": 12}, r"network\.dit\.heads=12: .* at most 6 heads"),
        ({"mlp": "swish"}, r"network\.dit\.mlp='swish' is unknown"),
        ({"text_by": "across"}, r"network\.dit\.text_by='across' is unknown"),
        ({"registers": -1}, r"network\.dit\.registers=-1: expected 0 \(none\) or more"),
        ({"bottleneck": -2}, r"network\.dit\.bottleneck=-2"),
        ({"scalars": -1}, r"network\.dit\.scalars=-1"),
        ({"features_after": 3}, r"network\.dit\.features_after=3: expected 0 \(none\) to 2"),
        ({"attention": "cudnn"}, r"network\.dit\.attention=cudnn takes bfloat16"),
        ({"text": TextConfig(heads=3)}, r"text\.bytes\.heads=3"),
        ({"noise_input": "sigma"}, r"network\.dit\.noise_input='sigma' is unknown"),
        ({"dropout": -0.1}, r"network\.dit\.dropout=-0\.1"),
        ({"num_classes": -1}, r"network\.dit\.num_classes=-1"),
    ],
)
def test_bad_sizes_name_the_field(options, message):
    with pytest.raises(ConfigError, match=message):
        functional(functools.partial(SMALL, **options))
