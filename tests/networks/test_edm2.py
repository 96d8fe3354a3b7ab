"""EDM2: magnitudes through the whole network, layouts, remat, text, sharding, sizes it refuses."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import drawn, jit, normal

from diffusion_jax.errors import ConfigError
from diffusion_jax.networks import EDM2, TextConfig, functional
from diffusion_jax.networks.edm2_plan import plan_runs
from diffusion_jax.networks.stacking import stack_blocks, unstack_blocks
from diffusion_jax.parallel.mesh import make_mesh
from diffusion_jax.parallel.sharding import path_name, shardings_for

SMALL = functools.partial(
    EDM2,
    (4, 4, 2),
    channels=8,
    multipliers=(1, 2),
    blocks=2,
    attention_resolutions=(4,),
    head_dim=4,
    dropout=0.2,
    num_classes=3,
    scalars=1,
    text=TextConfig(dim=8, depth=1, heads=2),
)


@functools.cache
def params(**options):
    """Initial parameters, gains at one."""
    tree = drawn(functional(functools.partial(SMALL, **options)).init, unit=True)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: np.ones_like(leaf) if path_name(path).endswith("gain") else leaf, tree
    )


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
    return normal(4, 4, 4, 2, seed=1), jnp.linspace(-1, 1, 4), conditioning


def loss_and_output(net, tree):
    """With dropout on."""
    out = net.apply(tree, *inputs(), key=jax.random.key(3))
    return jnp.mean(jnp.sin(out)), out


@functools.cache
def output_and_gradients(**options):
    """With dropout on; gradients in the layout of the parameters."""
    net = functional(functools.partial(SMALL, **options))
    tree = params() if options.get("scan", True) else jit(unstack_blocks)(params())

    loss = functools.partial(loss_and_output, net)
    (_, out), gradients = jit(jax.value_and_grad(loss, has_aux=True))(tree)
    return out, gradients


def assert_gradients_close(gradients, expected, tolerance):
    """To `tolerance` times the largest entry of the whole tree."""
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    for (path, one), two in zip(
        jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(gradients), strict=True
    ):
        np.testing.assert_allclose(two, one, atol=tolerance * largest, err_msg=path_name(path))


@functools.cache
def applied():
    net = functional(SMALL)

    @functools.partial(jit, static_argnames="drop")
    def run(tree, drop, entries):
        x, noise, conditioning = inputs()
        conditioning = {k: v for k, v in conditioning.items() if k not in drop}
        return net.apply(tree, x, noise, {**conditioning, **entries})

    def given(tree=None, **entries):
        # All calls give all entries, so that one program serves them.
        whole = {f"{name}_keep": jnp.ones(4, bool) for name in DROP}
        return run(tree or params(), (), {"text": inputs()[2]["text"], **whole, **entries})

    return given, lambda: run(params(), DROP, {})


DROP = ("text", "scalar")


def test_unit_variance_in_gives_unit_variance_out():
    net = functional(
        functools.partial(
            EDM2, (16, 16, 4), channels=64, multipliers=(1, 2), blocks=2, attention_resolutions=(8,)
        )
    )
    tree = drawn(net.init, unit=True)
    tree["gain"] = jnp.ones(())
    apply = jit(net.apply)
    x, noise = normal(2, 16, 16, 4, seed=1), jnp.array([-1.0, 0.5])
    out = apply(tree, x, noise, {})
    # The convolutions see zeros around the map: a little is lost there.
    assert 0.7 < float(jnp.std(out)) < 1.2
    large = jax.tree.map(lambda leaf: 30 * leaf if leaf.ndim else leaf, tree)
    np.testing.assert_allclose(apply(large, x, noise, {}), out, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"scan": False}, {"remat": "full"}])
def test_neither_layout_nor_remat_changes_a_gradient(options):
    out, gradients = output_and_gradients()
    out2, gradients2 = output_and_gradients(**options)
    np.testing.assert_allclose(out2, out, atol=1e-5)
    if "scan" in options:
        gradients2 = jit(stack_blocks)(gradients2)
    assert_gradients_close(gradients2, gradients, 1e-4)


@pytest.mark.slow
def test_every_part_is_trained():
    # One block a level and no dropout: a third of the time to compile.
    options = {"blocks": 1, "dropout": 0.0}
    loss = functools.partial(loss_and_output, functional(functools.partial(SMALL, **options)))
    gradients, _ = jit(jax.grad(loss, has_aux=True))(params(**options))
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.abs(leaf).max() > 0, path_name(path)


def saved_for_backward(remat):
    """Entries kept from the forward for the backward pass, parameters aside."""
    net = functional(functools.partial(SMALL, dropout=0.0, remat=remat))
    x, noise, conditioning = inputs()

    def residuals(tree, x, noise):
        return jax.vjp(lambda tree: net.apply(tree, x, noise, conditioning), tree)[1]

    kept = jax.eval_shape(residuals, params(), x, noise)
    return sum(leaf.size for leaf in jax.tree.leaves(kept))


@pytest.mark.slow
def test_remat_keeps_less_for_the_backward_pass():
    none, dots, full = map(saved_for_backward, ("none", "dots", "full"))
    assert full < dots < none


@pytest.mark.slow
def test_forced_normalisation_changes_the_stored_weights_and_nothing_else():
    net = functional(SMALL)
    tree = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (3 if path_name(path).startswith("up/") else 1) * leaf + 0.01, params()
    )
    tree["objective"] = {"kernel": jnp.full((2, 3), 7.0)}
    once = jit(net.post_update)(tree)
    moved = set()
    for (path, before), after in zip(
        jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(once), strict=True
    ):
        name = path_name(path)
        if np.array_equal(before, after):
            continue
        moved.add(name.partition("/")[0])
        own = after if "/blocks/" in name else after[None]
        size = jnp.sqrt(jnp.mean(own**2, axis=tuple(range(1, own.ndim - 1))))
        np.testing.assert_allclose(size, 1.0, rtol=1e-4, err_msg=name)
    assert moved == {"condition", "stem", "down", "middle", "up", "head"}
    networks = [{k: v for k, v in t.items() if k != "objective"} for t in (tree, once)]
    given, _ = applied()
    np.testing.assert_allclose(given(networks[1]), given(networks[0]), atol=1e-4)


def test_unstacked_weights_are_normalised_alike():
    net = functional(SMALL)
    tree = jax.tree.map(lambda leaf: 2 * leaf + 0.1, params())
    apart, together = jit(
        lambda tree: (stack_blocks(net.post_update(unstack_blocks(tree))), net.post_update(tree))
    )(tree)
    for one, two in zip(jax.tree.leaves(apart), jax.tree.leaves(together), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5)


def test_padding_of_the_text_changes_nothing():
    given, _ = applied()
    text = inputs()[2]["text"]
    base = given(text=text)
    longer = given(text=np.pad(text, ((0, 0), (0, 7))))
    np.testing.assert_allclose(longer, base, atol=2e-5)
    changed = np.array(text)
    changed[0, 4] += 1
    distance = np.abs(given(text=changed) - base).max(axis=(1, 2, 3))
    assert distance[0] > 1e-4
    assert distance[1:].max() < 1e-6


def test_what_is_dropped_is_as_if_absent():
    given, without = applied()
    whole, absent, keep = given(), without(), jnp.asarray([True, False, False, True])
    mixed = given(**{f"{name}_keep": keep for name in DROP})
    np.testing.assert_allclose(mixed[1:3], absent[1:3], atol=1e-5)
    np.testing.assert_allclose(mixed[::3], whole[::3], atol=1e-5)
    for name in DROP:
        one = given(**{f"{name}_keep": keep})
        np.testing.assert_allclose(one[::3], whole[::3], atol=1e-5)
        assert np.abs(whole - one)[1].max() > 1e-3


@pytest.mark.slow
def test_sharded_equals_unsharded():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    shardings = shardings_for(params(), mesh, min_size=64)
    step = jax.value_and_grad(functools.partial(loss_and_output, functional(SMALL)), has_aux=True)
    with jax.set_mesh(mesh):
        tree = jax.device_put(params(), shardings)
        (_, out), gradients = jit(step, out_shardings=(None, shardings))(tree)
    blocks = tree["down"]["level1_0"]["blocks"]
    for name in ("conv1", "conv2", "ada"):
        kernel = blocks[name]["kernel"]
        assert kernel.addressable_shards[0].data.size == kernel.size // 4, name
    assert np.abs(out).mean() > 0.1
    expected, expected_gradients = output_and_gradients()
    np.testing.assert_allclose(out, expected, atol=2e-5)
    assert_gradients_close(gradients, expected_gradients, 1e-5)


def test_blocks_alike_that_follow_each_other_are_stacked():
    plan = plan_runs([8, 16, 24], 3, {1}, [0, 2, 3])
    assert [(run.name, run.depth) for run in plan["down"]] == [
        ("level0_0", 3),
        ("level1_down", 1),
        ("level1_0", 1),
        ("level1_1", 2),
        ("level2_down", 1),
        ("level2_0", 1),
        ("level2_1", 2),
    ]
    assert sum(run.depth for runs in plan.values() for run in runs) == 3 * 3 + 2 + 2 + 3 * 4 + 2
    assert [(run.name, run.depth) for run in plan["up"]] == [
        ("level2_0", 3),
        ("level2_3", 1),
        ("level1_up", 1),
        ("level1_0", 1),
        ("level1_1", 2),
        ("level1_3", 1),
        ("level0_up", 1),
        ("level0_0", 1),
        ("level0_1", 3),
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"shape": (16, 3), "text": None},
        {"shape": (4, 4, 4, 1), "scalars": 0, "out_channels": 2},
        {"multipliers": (1,), "num_classes": 0, "dtype": "float16"},
    ],
)
def test_other_options_give_the_shape(options):
    options = {"shape": (8, 8, 2), "attention_resolutions": (), **options}
    shape = options.pop("shape")
    net = functional(functools.partial(EDM2, shape, **{**SMALL.keywords, **options}))
    tree = jax.eval_shape(net.init, jax.random.key(0))
    out = jax.eval_shape(net.apply, tree, jnp.ones((2, *shape)), jnp.zeros(2), {})
    assert out.shape == (2, *shape[:-1], options.get("out_channels", shape[-1]))
    assert out.dtype == jnp.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 5}, r"network\.edm2\.head_dim=5 does not divide .*\(8\); nearest: 4"),
        ({"multipliers": (1, 1, 1, 1)}, r"network\.edm2\.multipliers=\(1, 1, 1, 1\): 4x4 cannot"),
        ({"attention_resolutions": (16,)}, r"network\.edm2\.attention_resolutions=\(16,\): no"),
        ({"blocks": 0}, r"network\.edm2\.blocks=0: expected at least 1"),
        ({"label_balance": 1.5}, r"network\.edm2\.label_balance=1\.5: expected a share from 0"),
        ({"remat": "some"}, r"network\.edm2\.remat='some' is unknown"),
        ({"attention": "cudnn"}, r"network\.edm2\.attention=cudnn takes bfloat16"),
        ({"dropout": 1.0}, r"network\.edm2\.dropout=1\.0"),
    ],
)
def test_bad_sizes_name_the_field(options, message):
    with pytest.raises(ConfigError, match=message):
        functional(functools.partial(SMALL, **options))
