import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P

from diffusion_jax.parallel.flops import count_flops, peak_flops
from diffusion_jax.parallel.mesh import make_mesh


def shape(*size, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(size, dtype)


def test_matrix_products():
    # 3 x 5 outputs, each 4 multiply-adds.
    assert count_flops(jnp.matmul, shape(3, 4), shape(4, 5)) == 120
    assert count_flops(jnp.matmul, shape(7, 3, 4), shape(7, 4, 5)) == 840
    assert (
        count_flops(lambda a, b: jnp.einsum("bij,ij->b", a, b), shape(2, 3, 4), shape(3, 4)) == 48
    )
    assert count_flops(lambda a: a + jnp.sin(a), shape(100)) == 0


def test_value_and_gradient_of_a_product_cost_three():
    def loss(w, x):
        return ((x @ w) ** 2).sum()

    forward = count_flops(loss, shape(8, 6), shape(10, 8))
    assert forward == 2 * 10 * 8 * 6
    assert count_flops(jax.value_and_grad(loss), shape(8, 6), shape(10, 8)) == 2 * forward
    assert count_flops(jax.value_and_grad(loss, (0, 1)), shape(8, 6), shape(10, 8)) == 3 * forward


@pytest.mark.parametrize(
    ("stride", "groups", "outputs"), [(1, 1, 8 * 8), (2, 1, 4 * 4), (1, 4, 8 * 8), (2, 2, 4 * 4)]
)
def test_convolution_and_its_gradients_cost_the_same(stride, groups, outputs):
    def conv(x, k):
        return jax.lax.conv_general_dilated(
            x,
            k,
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        ).sum()

    args = shape(2, 8, 8, 4), shape(3, 3, 4 // groups, 12)
    by_hand = 2 * 2 * outputs * 12 * (4 // groups) * 9
    assert count_flops(conv, *args) == by_hand
    assert count_flops(jax.value_and_grad(conv, 0), *args) == 2 * by_hand
    assert count_flops(jax.value_and_grad(conv, 1), *args) == 2 * by_hand


def test_transposed_convolution_counts_no_holes():
    def up(x, k):
        return jax.lax.conv_transpose(x, k, (2, 2), "SAME")

    # Each of the 8 x 8 inputs touches 3 x 3 outputs with every pair of 4 and 6 channels.
    flops = count_flops(up, shape(1, 8, 8, 4), shape(3, 3, 4, 6))
    assert flops == 2 * 8 * 8 * 9 * 4 * 6


def stack(policy=None, remat=False):
    def body(h, w):
        return jnp.tanh(h @ w), None

    if remat:
        body = jax.checkpoint(body, policy=policy)
    return lambda w, x: jax.lax.scan(body, x, w)[0].sum()


def test_scan_multiplies_by_its_length_and_jit_is_transparent():
    once = 2 * 4 * 8 * 8
    args = shape(5, 8, 8), shape(4, 8)
    assert count_flops(stack(), *args) == 5 * once
    assert count_flops(jax.jit(jax.jit(stack())), *args) == 5 * once
    assert count_flops(jax.grad(stack(), (0, 1)), *args) == 15 * once
    nested = lambda w, x: jax.lax.scan(lambda s, _: (s + stack()(w, x), None), 0.0, None, 3)[0]  # noqa: E731
    assert count_flops(nested, *args) == 15 * once


def test_rematerialisation_counts_only_when_asked():
    once = 2 * 4 * 8 * 8
    args = shape(5, 8, 8), shape(4, 8)
    full = jax.value_and_grad(stack(remat=True), (0, 1))
    assert count_flops(full, *args) == 15 * once
    assert count_flops(full, *args, recomputation=True) == 20 * once
    saved = stack(jax.checkpoint_policies.dots_with_no_batch_dims_saveable, remat=True)
    saved = jax.value_and_grad(saved, (0, 1))
    assert count_flops(saved, *args, recomputation=True) == 15 * once


def test_branches_take_the_dearest_and_loops_one_turn():
    w = shape(8, 8)

    def branches(i, w):
        return jax.lax.switch(i, [lambda w: w, lambda w: w @ w, lambda w: w @ w @ w], w)

    assert count_flops(branches, shape(dtype=jnp.int32), w) == 2 * 2 * 8**3

    def loop(w):
        return jax.lax.while_loop(lambda w: w.sum() < 3, lambda w: w @ w, w)

    assert count_flops(loop, w) == 2 * 8**3


def test_custom_derivatives_and_vmap_are_seen_through():
    @jax.custom_vjp
    def product(a, b):
        return a @ b

    product.defvjp(lambda a, b: (a @ b, (a, b)), lambda r, g: (g @ r[1].T, r[0].T @ g))
    args = shape(3, 4), shape(4, 5)
    assert count_flops(product, *args) == 120
    assert count_flops(jax.grad(lambda a, b: product(a, b).sum(), (0, 1)), *args) == 360
    assert count_flops(jax.vmap(product, (0, None)), shape(6, 3, 4), shape(4, 5)) == 720

    @jax.custom_jvp
    def other(a, b):
        return a @ b

    other.defjvps(lambda da, _, a, b: da @ b, lambda db, _, a, b: a @ db)
    assert count_flops(jax.jit(other), *args) == 120


def test_shard_map_counts_all_devices():
    mesh = make_mesh()

    def sharded(x, w):
        return jax.shard_map(
            lambda x, w: x @ w, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data")
        )(x, w)

    assert count_flops(sharded, shape(16, 4), shape(4, 5)) == 2 * 16 * 4 * 5


def test_pallas_kernels_count_every_cell_of_the_grid():
    def kernel(x, w, out):
        out[...] = x[...] @ w[...]

    def tiled(x, w):
        return pl.pallas_call(
            kernel,
            grid=(4,),
            in_specs=[
                pl.BlockSpec((8, 8), lambda i: (i, 0)),
                pl.BlockSpec((8, 8), lambda i: (0, 0)),
            ],
            out_specs=pl.BlockSpec((8, 8), lambda i: (i, 0)),
            out_shape=jax.ShapeDtypeStruct((32, 8), jnp.float32),
            interpret=True,
        )(x, w)

    assert count_flops(tiled, shape(32, 8), shape(8, 8)) == 2 * 32 * 8 * 8


def test_attention_is_two_products():
    q, k = shape(2, 16, 4, 8), shape(2, 32, 4, 8)
    flops = count_flops(lambda q, k: jax.nn.dot_product_attention(q, k, k), q, k)
    assert flops == 2 * (2 * 2 * 4 * 16 * 32 * 8)


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
    ],
)
def test_peaks(kind, tera):
    assert peak_flops(kind) == tera * 1e12


def test_unknown_devices_have_no_peak():
    assert peak_flops(jax.devices()[0].device_kind) is None
    assert peak_flops("TPU v9") is None
