"""Muon's direction against the singular value decomposition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick import jit

from diffusion_jax.networks import functional
from diffusion_jax.networks.dit import DiT
from diffusion_jax.networks.unet import UNet
from diffusion_jax.parallel.mesh import make_mesh
from diffusion_jax.parallel.sharding import path_name
from diffusion_jax.training.muon import is_hidden_matrix, scale_by_muon_or
from diffusion_jax.training.optimizer import muon

RMS = 0.2


def direction(path, grad, **options):
    """The first direction for a gradient at a path such as `blocks/kernel`."""
    outer, inner = path.split("/")
    tx = scale_by_muon_or(optax.scale_by_adam(), rms=RMS, **options)
    tree = {outer: {inner: jnp.asarray(grad)}}
    updates, _ = jit(tx.update)(tree, tx.init(tree), tree)
    return np.asarray(updates[outer][inner])


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def check_orthogonal(update, grad):
    """update = rms sqrt(max) U S' V^T with S' near 1 and U, V of the gradient."""
    u, _, vt = np.linalg.svd(grad, full_matrices=False)
    scale = RMS * np.sqrt(max(grad.shape))
    inner = u.T @ update @ vt.T / scale
    values = np.linalg.svd(update / scale, compute_uv=False)
    assert 0.6 < values.min() < values.max() < 1.3
    np.testing.assert_allclose(inner, np.diag(np.diag(inner)), atol=2e-3)
    assert np.diag(inner).min() > 0.6
    np.testing.assert_allclose(np.sqrt(np.mean(update**2)), RMS, rtol=0.2)


@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6)])
def test_direction_is_the_orthogonal_factor(shape):
    grad = random(*shape)
    check_orthogonal(direction("fc/kernel", grad), grad)


def test_the_size_of_the_gradient_does_not_matter():
    grad = random(8, 12)
    small, large = direction("fc/kernel", 1e-4 * grad), direction("fc/kernel", 1e4 * grad)
    np.testing.assert_allclose(small, large, atol=2e-4)


def test_stacked_layers_are_matrices_of_their_own():
    """One layer's huge gradient must not drown the others', as it would in one flat matrix."""
    grad = random(3, 10, 6) * np.array([1.0, 1e3, 1e-3], np.float32)[:, None, None]
    update = direction("blocks/kernel", grad)
    for layer in range(3):
        check_orthogonal(update[layer], grad[layer])
        alone = direction("fc/kernel", grad[layer])
        np.testing.assert_allclose(update[layer], alone, atol=1e-4)


def test_convolutions_lay_their_taps_side_by_side():
    grad = random(3, 3, 4, 10)
    update = direction("conv/kernel", grad)
    check_orthogonal(update.reshape(36, 10), grad.reshape(36, 10))
    stacked = direction("blocks/kernel", np.stack([grad, 2.0 * grad]))
    np.testing.assert_allclose(stacked, np.stack([update, update]), atol=1e-4)


def test_momentum_is_what_is_made_orthogonal():
    """Without Nesterov's step the second direction is that of beta g1 + g2."""
    tx = scale_by_muon_or(optax.scale_by_adam(), beta=0.6, nesterov=False, rms=RMS)
    grads = [random(8, 8, seed=n) for n in range(2)]
    state = tx.init({"fc": {"kernel": jnp.zeros((8, 8))}})
    for grad in grads:
        updates, state = tx.update({"fc": {"kernel": jnp.asarray(grad)}}, state)
    check_orthogonal(np.asarray(updates["fc"]["kernel"]), 0.6 * grads[0] + grads[1])


def parameters(make):
    shapes = jax.eval_shape(functional(make).init, jax.random.key(0))
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    return {path_name(path): leaf for path, leaf in leaves}


def test_embeddings_norms_first_and_last_layers_go_to_adamw():
    dit = parameters(
        lambda rngs: DiT((8, 8, 3), dim=32, depth=2, heads=2, num_classes=3, rngs=rngs)
    )
    taken = {path for path, leaf in dit.items() if is_hidden_matrix(path, leaf)}
    blocks = {path for path in dit if path.startswith("blocks/") and path.endswith("kernel")}
    assert taken == blocks | {"ada/kernel"}
    unet = parameters(
        lambda rngs: UNet((8, 8, 3), channels=32, multipliers=(1, 2), num_classes=3, rngs=rngs)
    )
    taken = {path for path, leaf in unet.items() if is_hidden_matrix(path, leaf)}
    assert {path.rpartition("/")[2] for path in taken} == {"kernel"}
    left = {path for path in unet if path.endswith("kernel")} - taken
    assert {path.split("/")[0] for path in left} == {"stem", "head", "condition"}


def test_the_rest_moves_as_under_adamw():
    tx = muon(lambda n: 0.01, weight_decay=0.1, clip_norm=None, eps=1e-12)
    params = {"fc": {"kernel": jnp.eye(4)}, "norm": {"scale": jnp.ones(4)}}
    grads = {"fc": {"kernel": 2.0 * jnp.eye(4)}, "norm": {"scale": jnp.array([1.0, -3, 5, -7])}}
    updates, _ = tx.update(grads, tx.init(params), params)
    sign = np.array([1.0, -1.0, 1.0, -1.0])
    np.testing.assert_allclose(updates["norm"]["scale"], -0.01 * sign, rtol=1e-5)
    kernel = np.asarray(updates["fc"]["kernel"])
    np.testing.assert_allclose(kernel, np.diag(np.diag(kernel)), atol=1e-6)
    # rms sqrt(4) times a singular value near one, and a tenth of the weight, of one.
    assert np.all(np.abs(np.diag(kernel) / -0.01 - 0.1 - 0.4) < 0.4 * 0.35)


def test_sharded_kernels_get_the_same_direction():
    grad = random(2, 32, 16)
    mesh = make_mesh(data=2, fsdp=4)
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
    placed = jax.device_put(grad, spec)
    np.testing.assert_allclose(
        direction("blocks/kernel", placed), direction("blocks/kernel", grad), atol=1e-5
    )
