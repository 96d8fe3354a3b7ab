"""DINOv2 against transformers, in all namings of its tensors; wrong weights."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recorded
from quick import jit

from diffusion_jax.errors import ConfigError
from diffusion_jax.evaluation.features import dinov2, transformer

TOLERANCE = 1e-5


def original(tensors):
    """The same weights as in the files of the authors."""
    renamed = {}
    for name, value in tensors.items():
        new = name.replace("embeddings.patch_embeddings.projection", "patch_embed.proj")
        new = new.replace("embeddings.position_embeddings", "pos_embed")
        new = re.sub(r"^embeddings\.", "", new).replace("layernorm.", "norm.")
        new = new.replace("encoder.layer.", "blocks.").replace(
            "attention.output.dense", "attn.proj"
        )
        new = re.sub(r"layer_scale(\d)\.lambda1", r"ls\1.gamma", new)
        new = new.replace("mlp.weights_in", "mlp.w12").replace("mlp.weights_out", "mlp.w3")
        if ".attention.query." in new:
            parts = [tensors[name.replace("query", part)] for part in ("query", "key", "value")]
            new, value = new.replace("attention.attention.query", "attn.qkv"), np.concatenate(parts)
        if ".attention." not in new:
            renamed[new] = value
    return renamed


def modules(tensors):
    """The same weights as transformers' modules have them in memory."""
    renamed = {}
    for name, value in tensors.items():
        new = re.sub(r"attention\.attention\.(.)\w*", r"attention.\1_proj", name)
        new = new.replace("attention.output.dense", "attention.o_proj")
        new = new.replace("weights_out", "down_proj")
        if "weights_in" in name:
            for part, half in zip(("gate_proj", "up_proj"), np.split(value, 2), strict=True):
                renamed[new.replace("weights_in", part)] = half
        else:
            renamed[new] = value
    return renamed


def features(network, images, positions="transformers"):
    pixels = transformer.normalise(jnp.asarray(images), dinov2.MEAN, dinov2.DEVIATION)
    run = jit(lambda params, x: dinov2.class_features(params, x, positions=positions))
    return run(network.params, pixels)


@pytest.mark.parametrize("name", ["dinov2", "dinov2_registers"])
def test_class_tokens_are_those_of_transformers(name):
    tensors, arrays = recorded.load(name)
    network = dinov2.build(tensors, "memory")
    images = arrays["images"]
    parts = {"same": images, "small": images[:, :56, :56], "oblong": images[:, :56, :84]}
    for part, pixels in parts.items():
        assert recorded.gap(features(network, pixels), arrays[part]) < TOLERANCE, part
    assert network.score == "FD-DINOv2"
    assert "registers" in network.params or name == "dinov2"


@pytest.mark.parametrize("name", ["dinov2", "dinov2_registers"])
def test_pictures_are_resized_as_by_pillow(name):
    tensors, arrays = recorded.load(name)
    network = dinov2.build(tensors, "memory")
    ours = jit(network.apply)(network.params, jnp.asarray(arrays["odd"][None]))["features"]
    assert ours.dtype == jnp.float32
    assert recorded.gap(ours, arrays["whole"]) < TOLERANCE


def test_position_embeddings_of_the_authors():
    tensors, arrays = recorded.load("dinov2")
    network = dinov2.build(original(tensors), "memory")
    assert "as original" in network.resize
    images = arrays["images"]
    for part, pixels in {"small": images[:, :56, :56], "oblong": images[:, :56, :84]}.items():
        theirs = arrays[f"{part}_original"]
        assert recorded.gap(features(network, pixels, "original"), theirs) < TOLERANCE
        assert recorded.gap(theirs, arrays[part]) > 1e-3


@pytest.mark.parametrize("name", ["dinov2", "dinov2_registers"])
def test_all_namings_are_the_same_network(name):
    tensors, _ = recorded.load(name)
    network = dinov2.build(tensors, "memory")
    chunks = {
        re.sub(r"^blocks\.", "blocks.0.", key): value for key, value in original(tensors).items()
    }
    classifier = {f"dinov2.{key}": value for key, value in tensors.items()}
    classifier["classifier.weight"] = np.zeros((3, 2), np.float32)
    for other in (original(tensors), modules(tensors), chunks, classifier):
        assert dinov2.build(other, "memory").weights_hash == network.weights_hash


def test_positions_are_told_or_follow_the_names():
    tensors, _ = recorded.load("dinov2")
    assert "as transformers" in dinov2.build(tensors, "memory").resize
    assert "as original" in dinov2.build(tensors, "memory", positions="original").resize
    with pytest.raises(ValueError, match="positions='origin' is unknown"):
        dinov2.build(tensors, "memory", positions="origin")


PUBLISHED = {  # parameters, less the mask token, as counted in transformers
    "dinov2_vits14": (384, 12, 1536, 22_056_576 - 384),
    "dinov2_vitb14": (768, 12, 3072, 86_580_480 - 768),
    "dinov2_vitl14": (1024, 24, 4096, 304_368_640 - 1024),
    "dinov2_vitg14": (1536, 40, 4096, 1_136_480_768 - 1536),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    width, depth, hidden, count = PUBLISHED[name]
    sizes = dinov2._Sizes(
        width=width,
        depth=depth,
        hidden=hidden,
        patch=14,
        positions=1 + 37**2,
        registers=0,
        gated=name == "dinov2_vitg14",
    )
    shapes = dinov2._expected(dinov2._TRANSFORMERS, sizes)
    assert sizes.name == name
    assert sum(np.prod(shape) for shape in shapes.values()) == count
    # Views of one number: as many tensors as the smallest network has, of the full width.
    one = {
        key: np.broadcast_to(np.float32(0), shape)
        for key, shape in shapes.items()
        if not re.search(r"layer\.[1-9]", key)
    }
    network = dinov2.build(one, "memory")
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), network.params)
    params["blocks"] = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((depth, *x.shape[1:]), x.dtype), params["blocks"]
    )
    assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == count
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.uint8)
    assert jax.eval_shape(network.apply, params, images)["features"].shape == (2, width)


def refusal(tensors) -> str:
    with pytest.raises(ConfigError) as error:
        dinov2.build(tensors, "some.safetensors")
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith("some.safetensors: not the weights of DINOv2: ")
    assert re.search(r"\(\d+ tensors, hash [0-9a-f]{16}\)$", message)
    return message


def test_wrong_weights_are_refused_in_one_line():
    tensors, _ = recorded.load("dinov2")
    fc1 = "encoder.layer.1.mlp.fc1.weight"
    assert f"missing: {fc1} (" in refusal({k: v for k, v in tensors.items() if k != fc1})
    assert "unexpected: head.bias (" in refusal({**tensors, "head.bias": np.zeros(3)})
    shaped = refusal({**tensors, fc1: tensors[fc1][:, :100]})
    assert f"of another shape: {fc1} [256, 100] instead of [256, 128] (" in shaped
    wild = {**tensors, fc1: np.full_like(tensors[fc1], np.nan)}
    assert f"not of finite floats: {fc1} (" in refusal(wild)
    assert "there is no embeddings.patch_embeddings" in refusal({"conv1.weight": np.zeros(3)})
    many = refusal({k: v for k, v in tensors.items() if "layer.0.attention" not in k})
    assert "attention.key.bias and 5 more" in many or " and 5 more" in many
    table = "embeddings.position_embeddings"
    assert "49 position embeddings" in refusal({**tensors, table: tensors[table][:, 1:]})
    patch = "embeddings.patch_embeddings.projection.weight"
    assert "is [96, 3, 14, 14], not [a multiple of 64" in refusal(
        {**tensors, patch: tensors[patch][:96]}
    )
    assert "patches of 13 pixels" in refusal({**tensors, patch: tensors[patch][:, :, 1:, 1:]})
