import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.parallel.arrays import gather, global_batch, to_host
from diffusion_jax.parallel.mesh import batch_sharding, make_mesh, replicated


def batch(size=16):
    x = np.random.default_rng(0).normal(size=(size, 4, 4, 1)).astype(np.float32)
    label = np.arange(size, dtype=np.int32)
    return {
        "x": x,
        "conditioning": {"label": label, "label_keep": label % 2 == 0, "caption": ["a"] * size},
        "id": np.arange(size) + 2**40,
    }


def test_batch_becomes_global_arrays_row_by_row():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    local = batch()
    out = global_batch(local, mesh)
    assert set(out) == {"x", "conditioning"}
    assert set(out["conditioning"]) == {"label", "label_keep"}
    for leaf in jax.tree.leaves(out):
        assert leaf.sharding == batch_sharding(mesh)
    np.testing.assert_array_equal(gather(out)["x"], local["x"])
    for shard in out["conditioning"]["label"].addressable_shards:
        np.testing.assert_array_equal(shard.data, local["conditioning"]["label"][shard.index])
        assert shard.data.shape == (4,)


@pytest.mark.parametrize("dtype", [np.float64, np.int64])
def test_values_that_would_be_cut_to_32_bits_are_refused(dtype):
    with pytest.raises(ValueError, match=rf"conditioning/label.*{np.dtype(dtype).name}"):
        global_batch({"conditioning": {"label": np.zeros(8, dtype)}}, make_mesh())


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"batch x has shape \(12, 2\).*divide by 8"):
        global_batch({"x": np.zeros((12, 2), np.float32)}, make_mesh())


def test_read_back_gives_numpy_of_every_placement():
    mesh = make_mesh()
    value = np.arange(8, dtype=np.float32)
    tree = {
        "sharded": jax.device_put(value, batch_sharding(mesh)),
        "whole": jax.device_put(value, replicated(mesh)),
        "plain": jnp.float32(3.0),
        "host": 4,
    }
    for read in (to_host(tree), gather(tree)):
        assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(read))
        np.testing.assert_array_equal(read["sharded"], value)
        np.testing.assert_array_equal(read["whole"], value)
        assert read["plain"] == 3.0
        assert read["host"] == 4
