"""What is kept of references, and published statistics that are none."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import recorded
from safetensors.numpy import save_file
from toys import one_device

from diffusion_jax.data import DataSpec
from diffusion_jax.errors import ConfigError
from diffusion_jax.evaluation import references
from diffusion_jax.evaluation.features import clip
from diffusion_jax.evaluation.features.extract import Extractor
from diffusion_jax.parallel.mesh import make_mesh


@pytest.fixture(autouse=True)
def _one_device():
    with one_device():
        yield


@dataclasses.dataclass(frozen=True)
class Noise:
    """Twelve pictures without classes."""

    spec = DataSpec(shape=(8, 8, 3), kind="image")

    def __len__(self):
        return 12

    def ids(self, indices):
        return indices

    def fetch(self, indices, positions=None):
        x = np.random.default_rng(0).uniform(-1, 1, (len(self), 8, 8, 3))
        return {"x": x[indices].astype(np.float32), "conditioning": {}}


def test_what_is_kept_is_that_of_the_options_of_the_network(tmp_path):
    weights, folder = tmp_path / "model.safetensors", tmp_path / "kept"
    tensors = recorded.load("clip_vision")[0]
    save_file(tensors, weights)

    def found():
        network = clip.build(tensors, str(weights))
        extractor = Extractor(network, make_mesh(), batch_size=12)
        reference = references.of_source(Noise(), "noise", extractor, ("features",), folder)
        return network, reference.features

    told = [("gelu", 4, 1e-5), ("gelu", 2, 1e-5), ("gelu", 4, 1e-3)]
    first, known = found()
    assert first.options == "quick_gelu, 1 heads, epsilon 1e-05"
    assert first.remark == "quick_gelu assumed: no config.json beside the file says which"
    features, options = [known], [first.options]
    for activation, heads, epsilon in told:
        part = {"hidden_act": activation, "num_attention_heads": heads, "layer_norm_eps": epsilon}
        (tmp_path / "config.json").write_text(json.dumps({"vision_config": part}))
        network, new = found()
        assert (network.name, network.weights_hash) == (first.name, first.weights_hash)
        assert network.remark == ""
        features.append(new)
        options.append(network.options)
    assert len(set(options)) == len(options) == len(list(folder.glob("*.npz")))
    for i, one in enumerate(features):
        for other in features[:i]:
            assert recorded.gap(one, other) > 1e-4
    # As they were: the same file and the same features.
    (tmp_path / "config.json").unlink()
    np.testing.assert_array_equal(found()[1], known)
    assert len(list(folder.glob("*.npz"))) == len(options)


def statistics(**changed):
    return {"mu": np.zeros(3), "sigma": np.eye(3), **changed}


@pytest.mark.parametrize("packed", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("kind", [np.float64, np.float32, np.int64])
def test_published_statistics(tmp_path, packed, kind):
    sigma = np.diag([2, 1, 0]).astype(kind)
    given = statistics(sigma=sigma, mu_s=np.ones(2), sigma_s=np.eye(2))
    for name, count in (("", None), ("n", 50_000), ("count", 7.0)):
        packed(tmp_path / "a.npz", **given, **({name: count} if name else {}))
        found = references.of_file(tmp_path / "a.npz")
        # The number is told by the file, or by nobody; the covariance is that of the file.
        assert found.count == count
        np.testing.assert_allclose(found.moments["features"].covariance, sigma, rtol=1e-12)
        np.testing.assert_allclose(found.moments["spatial"].covariance, np.eye(2), rtol=1e-12)
        assert {moments.count for moments in found.moments.values()} == {count or 2}


def test_covariances_of_single_precision_are_taken(tmp_path):
    features = np.random.default_rng(0).normal(size=(20, 60)).astype(np.float32)
    sigma = np.cov(features, rowvar=False).astype(np.float32)
    sigma[0, 1] = np.nextafter(sigma[0, 1], np.float32(9))
    # Of fewer examples than dimensions: the smallest eigenvalues are rounding, on either side of 0.
    assert np.linalg.eigvalsh(sigma.astype(np.float64))[0] < 0
    np.savez(tmp_path / "a.npz", mu=features.mean(0), sigma=sigma)
    np.testing.assert_array_equal(
        references.of_file(tmp_path / "a.npz").moments["features"].covariance, sigma
    )


texts = np.array(["a", "b", "c"])
whole = "; expected a whole number from 2"
BAD = {
    "texts": (statistics(mu=texts), ": mu (<U1) is not of finite real numbers"),
    "no numbers": (
        statistics(sigma=np.full((3, 3), np.nan)),
        ": sigma (float64) is not of finite real numbers",
    ),
    "complex": (
        statistics(sigma=np.eye(3) * 1j),
        ": sigma (complex128) is not of finite real numbers",
    ),
    "negative": (statistics(sigma=-np.eye(3)), ": sigma is no covariance: eigenvalue -1"),
    "one negative": (
        statistics(sigma=np.diag([1, 1, -1e-5])),
        ": sigma is no covariance: eigenvalue -1e-05",
    ),
    "not symmetric": (
        statistics(sigma=np.eye(3) + 0.1 * np.eye(3, k=1)),
        ": sigma is no covariance: not symmetric by 0.1",
    ),
    "nothing": (
        statistics(mu=np.zeros(0), sigma=np.zeros((0, 0))),
        ": mu has shape (0,) and sigma (0, 0); expected [D] and [D, D]",
    ),
    "several numbers": (statistics(n=np.array([3, 4])), f": n=[3, 4]{whole}"),
    "text as number": (statistics(n="many"), f": n='many'{whole}"),
    "one example": (statistics(count=1), f": count=1{whole}"),
    "half an example": (statistics(n=2.5), f": n=2.5{whole}"),
    "no number": (statistics(n=np.nan), f": n=nan{whole}"),
    "pickle": (
        statistics(mu=np.array([1, "a", None])),
        ": no .npz of arrays; expected mu and sigma",
    ),
    "spatial": (
        statistics(mu_s=np.zeros(2), sigma_s=-np.eye(2)),
        ", mu_s and sigma_s: sigma is no covariance: eigenvalue -1",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_statistics_that_are_none(tmp_path, kind):
    given, words = BAD[kind]
    path = tmp_path / "a.npz"
    np.savez(path, **given)
    with pytest.raises(ConfigError) as raised:
        references.of_file(path)
    assert str(raised.value) == f"reference={str(path)!r}{words}"


def test_files_that_are_no_statistics(tmp_path):
    path, words = tmp_path / "a.npz", "no .npz of arrays; expected mu and sigma"
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    parts = {"one array": path.read_bytes(), "nothing": b"", "text": b"mu and sigma"}
    np.savez_compressed(path, **statistics(mu=np.arange(900.0), sigma=np.eye(900)))
    whole = bytearray(path.read_bytes())
    parts["cut off"] = bytes(whole[:900])
    whole[100:400] = bytes(300)
    parts["damaged"] = bytes(whole)
    for content in parts.values():
        path.write_bytes(content)
        with pytest.raises(ConfigError) as raised:
            references.of_file(path)
        assert str(raised.value) == f"reference={str(path)!r}: {words}"
