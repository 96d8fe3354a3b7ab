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
