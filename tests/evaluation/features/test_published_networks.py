"""Feature networks of published weights: parity with PyTorch's on drawn ones, and what is refused.

The recordings are made by `benchmarks/feature_references.py`.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import feature_recipe as recipe
import jax
import numpy as np
import pytest

from diffusion_jax.errors import ConfigError
from diffusion_jax.evaluation.features import efficientnet_lite0, inception
from diffusion_jax.evaluation.features.protocol import params_hash

RECORDED = Path(__file__).parents[2] / "golden" / "features"
NETWORKS = [inception, efficientnet_lite0]
SIZES = [(32, 32), (64, 48), (299, 299)]
TOLERANCE = 1e-5


@functools.cache
def drawn(module):
    return recipe.weights(module.shapes())


@functools.cache
def built(module):
    return module.build(drawn(module), "drawn.pth")


@pytest.fixture(params=NETWORKS, ids=lambda module: module.NAME)
def module(request):
    return request.param


def blank(module):
    """Tensors of the right names and shapes that take no memory."""
    return {name: np.broadcast_to(np.float32(1), shape) for name, shape in module.shapes().items()}


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_features_are_pytorchs(module, size):
    recorded = np.load(RECORDED / f"{module.NAME}.npz")
    # Otherwise another network, or another picture, is compared.
    assert recipe.digest(drawn(module)) == recorded["weights"]
    label = "x".join(map(str, size))
    picture = recipe.picture(*size)
    assert recipe.digest({"picture": picture}) == recorded[f"picture_{label}"]
    network = built(module)
    outputs = network.apply(network.params, picture[None])
    kinds = {name.split("_")[0] for name in recorded.files} - {"weights", "picture"}
    assert set(outputs) == kinds
    for name, found in outputs.items():
        expected = recorded[f"{name}_{label}"]
        assert found.shape == expected.shape, name
        gap = np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()
        assert gap < TOLERANCE, (name, gap)


def test_recorded_pictures_differ_by_far_more_than_the_tolerance(module):
    recorded = np.load(RECORDED / f"{module.NAME}.npz")
    kinds = {name.split("_")[0] for name in recorded.files} - {"weights", "picture"}
    for name in kinds:
        small, large = (recorded[f"{name}_{size}"] for size in ("32x32", "299x299"))
        assert np.abs(small - large).max() > 0.02 * np.abs(large).max(), name


def test_batches_under_jit(module):
    network = built(module)
    pictures = np.stack([recipe.picture(32, 32), recipe.picture(32, 32)[::-1]])
    together = jax.jit(network.apply)(network.params, pictures)
    alone = network.apply(network.params, pictures[1:])
    for name, value in alone.items():
        scale = np.abs(np.asarray(value)).max()
        np.testing.assert_allclose(together[name][1], value[0], atol=TOLERANCE * scale)


def test_what_a_network_says_of_itself(module):
    network = built(module)
    assert network.name == module.NAME
    assert network.weights_hash == params_hash(network.params)
    leaves = jax.tree.leaves(network.params)
    assert {leaf.dtype for leaf in leaves} == {np.dtype(np.float32)}
    assert sum(leaf.size for leaf in leaves) == sum(x.size for x in drawn(module).values())
    assert {inception: "FD-Inception", efficientnet_lite0: "FD-EffNetLite0"}[module] == (
        network.score
    )


def test_only_the_published_file_gives_a_fid(tmp_path, monkeypatch):
    # What pytorch-fid's file is called says how its SHA-256 begins.
    for digits, name in inception.PUBLISHED.items():
        assert len(digits) == 16
        assert name.endswith(f"-{digits[:8]}.pth")
    path = tmp_path / "weights.pth"
    path.write_bytes(b"as published")
    assert inception.build(blank(inception), str(path)).score == "FD-Inception"
    digits = hashlib.sha256(b"as published").hexdigest()[:16]
    monkeypatch.setitem(inception.PUBLISHED, digits, "weights.pth")
    assert inception.build(blank(inception), str(path)).score == "FID"
    path.write_bytes(b"as published.")
    assert inception.build(blank(inception), str(path)).score == "FD-Inception"


def test_tensorflows_resizing_is_another_one():
    network = inception.build(drawn(inception), "drawn.pth", resize="tf1")
    assert network.resize != built(inception).resize
    params, size = network.params, inception.SIZE
    large = recipe.picture(size, size)[None]
    # Of the same size nothing is resized: what is left is 127.5 or 128 as the middle.
    ours, other = (net.apply(params, large)["features"] for net in (network, built(inception)))
    assert 1e-5 < np.abs(ours - other).max() / np.abs(other).max() < 0.05
    small = recipe.picture(23, 23)[None]
    ours, other = (net.apply(params, small)["features"] for net in (network, built(inception)))
    assert np.abs(ours - other).max() / np.abs(other).max() > 1e-3
    with pytest.raises(ConfigError, match=r"resize='tf2' is unknown.*pytorch_fid, tf1"):
        inception.build(drawn(inception), "drawn.pth", resize="tf2")


def test_counters_of_batch_normalisation_are_no_part(module):
    counters = {"x.bn.num_batches_tracked": np.array(7)}
    network = module.build({**blank(module), **counters}, "w.pth")
    assert network.weights_hash == module.build(blank(module), "w.pth").weights_hash


def test_wrong_weights_are_refused_in_one_line(module):
    tensors = blank(module)
    first, second, *_, last = tensors
    classes = list(tensors[last].shape)
    cases = {
        f"missing: {first}": {name: x for name, x in tensors.items() if name != first},
        "unexpected: aux, bux, cux, and 2 more": {
            **tensors,
            **{name: np.ones(3) for name in ("aux", "bux", "cux", "dux", "eux")},
        },
        rf"of another shape: {last} \[7\] instead of \[{classes[0]}\]": {
            **tensors,
            last: np.ones(7, np.float32),
        },
        f"not of finite floats: {first}, {second}": {
            **tensors,
            first: np.ones(tensors[first].shape, np.int64),
            second: np.full(tensors[second].shape, np.nan, np.float32),
        },
        f"missing: {first}, .*, and [0-9]+ more; unexpected: w": {"w": np.ones(3, np.float32)},
    }
    for reason, wrong in cases.items():
        with pytest.raises(ConfigError, match=rf"{reason} \(") as caught:
            module.build(wrong, "some/w.pth")
        message = str(caught.value)
        assert message.startswith(f"some/w.pth: not the weights of {module.NAME}: ")
        assert message.endswith(f" ({len(wrong)} tensors, hash {params_hash(wrong)})")
        assert "\n" not in message


@pytest.mark.parametrize(
    "pictures",
    [
        np.zeros((2, 32, 32, 3), np.float32),
        np.zeros((2, 32, 32, 1), np.uint8),
        np.zeros((32, 32, 3), np.uint8),
    ],
)
def test_only_colour_pictures_of_bytes(module, pictures):
    network = built(module)
    with pytest.raises(ValueError, match=r"pictures: .*expected uint8 \[B, H, W, 3\]"):
        network.apply(network.params, pictures)
