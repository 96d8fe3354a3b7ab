"""Features are the same on one device and on eight, for any number of pictures."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recorded

from diffusion_jax.errors import ConfigError
from diffusion_jax.evaluation.features import clip
from diffusion_jax.evaluation.features.extract import Extractor, OverDevices
from diffusion_jax.evaluation.features.protocol import FeatureNetwork
from diffusion_jax.parallel.mesh import make_mesh

pytestmark = pytest.mark.usefixtures("quick_programs")


def tiny(apply=None):
    """Pixels of the first row and column, times a parameter: each picture tells where it was."""

    def first(params, pixels):
        return {"features": params["scale"] * pixels[:, 0, 0].astype(jnp.float32)}

    return FeatureNetwork(
        name="tiny",
        score="FD-tiny",
        params={"scale": np.float32(2.0) * np.ones(3, np.float32)},
        apply=apply or first,
        resize="none",
        weights_hash="0",
    )


def numbered(count):
    """Pictures [n, 2, 2, 3] with their number in each pixel."""
    return np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 2, 2, 3))


@pytest.mark.parametrize("count", [1, 7, 24, 27, 53])
@pytest.mark.parametrize("axes", [(8, 1, 1, 1), (2, 2, 1, 2)])
def test_pictures_come_back_in_order(count, axes):
    extractor = Extractor(tiny(), make_mesh(*axes), batch_size=13)
    found = extractor(numbered(count))["features"]
    expected = 2.0 * np.arange(count)[:, None] * np.ones(3)
    np.testing.assert_array_equal(found, expected)


def test_a_network_on_eight_devices_and_on_one():
    network = clip.build(recorded.load("clip")[0], "memory")
    pixels = np.random.default_rng(0).integers(0, 256, (21, 12, 9, 1), dtype=np.uint8)
    one = Extractor(network, make_mesh(devices=jax.devices()[:1]), batch_size=10)
    eight = Extractor(network, make_mesh(), batch_size=10)
    assert len(jax.devices()) == 8
    alone, split = one(pixels), eight(pixels)
    assert set(alone) == {"features", "normalised"}
    for name, value in alone.items():
        assert value.shape == (21, 48)
        np.testing.assert_allclose(split[name], value, rtol=1e-4, atol=1e-5)
    # A batch of eight devices is cut in eight, and its parameters are on each.
    leaf = jax.tree.leaves(eight._run._placed)[0]
    assert len(leaf.sharding.device_set) == 8
    assert leaf.is_fully_replicated


def test_a_batch_is_split_over_the_devices():
    seen = []

    def apply(params, pixels):
        def note(part):
            seen.append(part.shape)
            return part[:, 0, 0].astype(np.float32)

        shape = jax.ShapeDtypeStruct((pixels.shape[0] // 8, 3), np.float32)
        spec = jax.sharding.PartitionSpec(("data", "fsdp"))
        return {
            "features": jax.shard_map(
                lambda part: jax.pure_callback(note, shape, part), in_specs=spec, out_specs=spec
            )(pixels)
        }

    found = Extractor(tiny(apply), make_mesh(), batch_size=13)(numbered(17))["features"]
    np.testing.assert_array_equal(found[:, 0], np.arange(17))
    assert set(seen) == {(2, 2, 2, 3)}


def test_rows_that_are_none_or_no_numbers():
    def bad(params, rows):
        return {"features": jnp.where(rows == 3, jnp.nan, rows.astype(jnp.float32))}

    run = OverDevices(bad, {}, make_mesh(), 4, "captions")
    with pytest.raises(ConfigError, match="no captions: expected at least one"):
        run(np.zeros((0, 1)))
    with pytest.raises(ConfigError, match=r"features of 2 of 5 captions are not finite: wrong w"):
        run(np.array([[0], [3], [1], [3], [2]], np.float32))
