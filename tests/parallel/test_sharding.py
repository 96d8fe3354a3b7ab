import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec as P

from diffusion_jax.errors import ConfigError
from diffusion_jax.parallel.mesh import make_mesh
from diffusion_jax.parallel.sharding import path_name, shardings_for, spec_for, with_shardings

FSDP = {"data": 1, "fsdp": 8}
BOTH = {"data": 1, "fsdp": 4, "tensor": 2}


@pytest.mark.parametrize(
    ("axes", "path", "shape", "expected"),
    [
        (FSDP, "head/kernel", (128, 256), P(None, "fsdp")),
        (FSDP, "head/kernel", (256, 128), P("fsdp")),
        (FSDP, "head/kernel", (4, 100), P()),  # small
        (FSDP, "head/kernel", (1001, 130), P()),  # nothing divides
        (FSDP, "head/kernel", (1001, 128), P(None, "fsdp")),  # the largest that divides
        (FSDP, "blocks/mlp/fc1/kernel", (4096, 128, 64), P(None, "fsdp")),  # never the scanned
        (FSDP, "blocks/norm/scale", (4096 * 8,), P()),
        (FSDP, "blocks/3/fc1/kernel", (256, 128), P("fsdp")),  # unstacked: axis 0 is free
        (FSDP, "myblocks/fc1/kernel", (256, 128), P("fsdp")),
        (FSDP, "step", (), P()),
        ({"data": 8}, "head/kernel", (1024, 1024), P()),
        (BOTH, "blocks/attn/qkv/kernel", (28, 256, 768), P(None, "fsdp", "tensor")),
        (BOTH, "blocks/attn/out/kernel", (28, 256, 256), P(None, "tensor", "fsdp")),
        (BOTH, "blocks/7/mlp/fc2/kernel", (1024, 256), P("tensor", "fsdp")),
        (BOTH, "head/kernel", (256, 128), P("fsdp")),
        # A factored moment has the path of its parameter but another rank: no tensor rule.
        (BOTH, "opt_state/v_row/blocks/attn/out/kernel", (28, 256), P()),
    ],
)
def test_spec(axes, path, shape, expected):
    assert spec_for(path, shape, make_mesh(**axes)) == expected


def test_tensor_axis_that_does_not_divide_is_an_error_with_the_nearest():
    with pytest.raises(
        ConfigError, match=r"mesh.tensor=4 .*axis 2 of blocks/qkv/kernel.*tensor=2$"
    ):
        spec_for("blocks/qkv/kernel", (2, 64, 66), make_mesh(tensor=4))


def small_state():
    params = {
        "blocks": {"qkv": {"kernel": jnp.zeros((8, 64, 192)), "bias": jnp.zeros((8, 192))}},
        "head": {"kernel": jnp.zeros((128, 136))},
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    return {
        "step": jnp.int32(0),
        "params": params,
        "opt_state": optimizer.init(params),
        "ema": {"default": params, "long": params},
        "key": jax.random.key(0),
    }


def test_everything_shaped_like_a_parameter_is_placed_like_it():
    mesh = make_mesh(**BOTH)
    abstract = jax.eval_shape(small_state)
    shardings = shardings_for(abstract, mesh)
    of_params = jax.tree.map(lambda s: s.spec, shardings["params"])
    assert of_params["blocks"]["qkv"]["kernel"] == P(None, "fsdp", "tensor")
    assert of_params["head"]["kernel"] == P(None, "fsdp")
    for copy in ("default", "long"):
        assert jax.tree.map(lambda s: s.spec, shardings["ema"][copy]) == of_params
    moments = [
        s for p, s in jax.tree_util.tree_leaves_with_path(shardings) if "/mu/" in path_name(p)
    ]
    assert [s.spec for s in moments] == jax.tree.leaves(
        of_params, is_leaf=lambda x: isinstance(x, P)
    )
    assert shardings["step"].spec == P()
    assert shardings["key"].spec == P()


def test_state_is_born_in_shards_of_the_expected_size():
    mesh = make_mesh(**BOTH)
    abstract = jax.eval_shape(small_state)
    shardings = shardings_for(abstract, mesh)
    state = jax.jit(small_state, out_shardings=shardings)()
    kernel = state["opt_state"][1][0].nu["blocks"]["qkv"]["kernel"]
    assert {s.data.shape for s in kernel.addressable_shards} == {(8, 16, 96)}
    placed = with_shardings(abstract, shardings)
    for leaf, expected in zip(jax.tree.leaves(state), jax.tree.leaves(placed), strict=True):
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (
            expected.shape,
            expected.dtype,
            expected.sharding,
        )
