"""The transformer: scanned against unrolled, remat, patches, positions, bad sizes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.errors import ConfigError
from diffusion_jax.networks import DiT, dit, functional
from diffusion_jax.networks.stacking import stack_blocks, unstack_blocks

# Tests compile much and compute little.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

SMALL = functools.partial(DiT, (8, 8, 2), dim=24, depth=3, heads=2, num_classes=3, dropout=0.2)


@functools.cache
def params():
    """Scanned parameters moved off their zero start."""
    tree = jit(functional(SMALL).init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda a: np.asarray(a) + 0.1 * rng.normal(size=a.shape).astype(np.float32), tree
    )


@functools.cache
def output_and_gradients(**options):
    """With dropout on; gradients in the layout of the parameters."""
    net = functional(functools.partial(SMALL, **options))
    tree = params() if options.get("scan", True) else jit(unstack_blocks)(params())
    x = jax.random.normal(jax.random.key(1), (4, 8, 8, 2))

    def loss(tree):
        key = jax.random.key(3)
        out = net.apply(tree, x, jnp.arange(4.0), {"label": jnp.arange(4) % 3}, key=key)
        return jnp.mean(jnp.sin(out)), out

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


def test_scanned_equals_unrolled_with_gradients_and_dropout():
    out, gradients = output_and_gradients()
    out2, gradients2 = output_and_gradients(scan=False)
    np.testing.assert_allclose(out2, out, atol=1e-5)
    assert_trees_close(jit(stack_blocks)(gradients2), gradients)


@pytest.mark.parametrize(("remat", "scan"), [("dots", True), ("full", True), ("full", False)])
def test_remat_changes_no_gradient(remat, scan):
    layout = {} if scan else {"scan": False}
    out, gradients = output_and_gradients(**layout)
    out2, gradients2 = output_and_gradients(**layout, remat=remat)
    np.testing.assert_allclose(out2, out, atol=1e-6)
    assert_trees_close(gradients2, gradients)


def saved_for_backward(remat):
    """Entries kept from the forward for the backward pass, parameters aside."""
    net = functional(functools.partial(SMALL, dropout=0.0, remat=remat))
    x = jax.ShapeDtypeStruct((4, 8, 8, 2), jnp.float32)
    noise = jax.ShapeDtypeStruct((4,), jnp.float32)

    def residuals(tree, x, noise):
        return jax.vjp(lambda tree: net.apply(tree, x, noise, {}), tree)[1]

    kept = jax.eval_shape(residuals, jax.eval_shape(net.init, jax.random.key(0)), x, noise)
    return sum(leaf.size for leaf in jax.tree.leaves(kept))


def test_remat_keeps_less_for_the_backward_pass():
    none, dots, full = map(saved_for_backward, ("none", "dots", "full"))
    assert full < dots < none


def test_patches_are_blocks_of_the_image_and_come_back():
    x = jnp.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
    tokens = dit.to_patches(x, 2)
    assert tokens.shape == (2, 6, 12)
    np.testing.assert_array_equal(tokens[1, 4], x[1, 2:4, 2:4].ravel())
    np.testing.assert_array_equal(dit.from_patches(tokens, (2, 3), 2, 3), x)
    video = jnp.arange(2 * 4 * 2 * 6 * 1.0).reshape(2, 4, 2, 6, 1)
    tokens = dit.to_patches(video, 2)
    np.testing.assert_array_equal(tokens[0, 4], video[0, 2:4, :, 2:4].ravel())
    np.testing.assert_array_equal(dit.from_patches(tokens, (2, 1, 3), 2, 1), video)


@pytest.mark.parametrize("positions", ["sincos", "learned"])
def test_positions_tell_equal_patches_apart(positions):
    net = functional(functools.partial(SMALL, positions=positions, out_channels=3))
    tree = jit(net.init)(jax.random.key(0))
    tree = jax.tree.map(
        lambda a: (
            np.asarray(a) + 0.1 * np.cos(np.arange(a.size, dtype=np.float32)).reshape(a.shape)
        ),
        tree,
    )
    assert ("positions" in tree) == (positions == "learned")
    out = jit(net.apply)(tree, jnp.ones((1, 8, 8, 2)), jnp.zeros(1), {})
    assert out.shape == (1, 8, 8, 3)
    tokens = dit.to_patches(out, 2)[0]
    assert len(np.unique(tokens.round(4), axis=0)) == 16


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
        ({"positions": "rope"}, r"network\.dit\.positions='rope' is unknown"),
        ({"noise_input": "sigma"}, r"network\.dit\.noise_input='sigma' is unknown"),
        ({"dropout": -0.1}, r"network\.dit\.dropout=-0\.1"),
        ({"num_classes": -1}, r"network\.dit\.num_classes=-1"),
    ],
)
def test_bad_sizes_name_the_field(options, message):
    with pytest.raises(ConfigError, match=message):
        functional(functools.partial(SMALL, **options))
