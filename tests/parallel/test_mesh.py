import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from diffusion_jax.errors import ConfigError
from diffusion_jax.parallel import mesh as meshes


def test_one_free_axis_takes_the_rest():
    mesh = meshes.make_mesh(data=-1, fsdp=2, tensor=2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "context": 1, "tensor": 2}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert meshes.make_mesh(1, -1).shape["fsdp"] == 8
    assert meshes.make_mesh(devices=jax.devices()[:3]).shape["data"] == 3


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ({"data": 3}, ["mesh.data=3", "device count 8", "nearest: mesh.data=8"]),
        ({"data": -1, "fsdp": 3}, ["mesh.fsdp=3", "divide the device count 8", "mesh.fsdp=4"]),
        ({"data": -1, "fsdp": 16}, ["mesh.fsdp=16", "nearest: mesh.fsdp=8"]),
        ({"data": 2, "fsdp": 8}, ["mesh.data=2 x mesh.fsdp=8 = 16", "nearest: mesh.fsdp=4"]),
        ({"data": 2}, ["mesh.data=2", "equal the device count 8", "nearest: mesh.data=8"]),
        ({"data": 4, "tensor": 0}, ["mesh.tensor=0", "positive"]),
        ({"data": -1, "context": -1}, ["mesh.context=-1", "only one", "nearest: mesh.context=1"]),
        ({"data": -2}, ["mesh.data=-2"]),
    ],
)
def test_axes_that_do_not_multiply_name_field_and_nearest(axes, words):
    with pytest.raises(ConfigError) as error:
        meshes.make_mesh(**axes)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_nearest_axes_are_valid_for_every_mistake():
    for data in range(1, 9):
        for tensor in range(1, 9):
            if data * tensor == 8:
                continue
            with pytest.raises(ConfigError) as error:
                meshes.make_mesh(data=data, tensor=tensor)
            advice = str(error.value).split("nearest: ")[1]
            fixed = {"data": data, "tensor": tensor}
            for part in advice.split(", "):
                axis, size = part.removeprefix("mesh.").split("=")
                fixed[axis] = int(size)
            assert meshes.make_mesh(**fixed).size == 8


def test_batch_is_cut_over_data_and_fsdp_and_repeated_over_the_rest():
    mesh = meshes.make_mesh(data=2, fsdp=2, tensor=2)
    x = jax.device_put(np.arange(8.0), meshes.batch_sharding(mesh))
    parts = sorted(tuple(np.asarray(s.data).tolist()) for s in x.addressable_shards)
    assert parts == sorted([(0, 1), (2, 3), (4, 5), (6, 7)] * 2)
    whole = jax.device_put(np.arange(3.0), meshes.replicated(mesh))
    assert [s.data.shape for s in whole.addressable_shards] == [(3,)] * 8
    assert meshes.batch_shards(mesh) == 4


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "nearest"),
    [(12, 1, "8 or 16"), (5, 1, "8"), (0, 1, "8"), (24, 2, "16 or 32")],
)
def test_batch_size_names_the_nearest_sizes(batch_size, accumulation, nearest):
    mesh = meshes.make_mesh()
    with pytest.raises(ConfigError, match=f"batch_size={batch_size} .*nearest: {nearest}$"):
        meshes.check_batch_size(batch_size, accumulation, mesh)
    for size in nearest.split(" or "):
        meshes.check_batch_size(int(size), accumulation, mesh)


def test_accumulation_must_be_positive():
    with pytest.raises(ConfigError, match="accumulation=0"):
        meshes.check_batch_size(8, 0, meshes.make_mesh())


def test_one_process_supplies_every_row():
    for axes in ({}, {"fsdp": 8, "data": 1}, {"tensor": 4}, {"context": 8, "data": 1}):
        mesh = meshes.make_mesh(**axes)
        np.testing.assert_array_equal(meshes.process_rows(mesh, 16), np.arange(16))
