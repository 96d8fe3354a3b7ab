"""Both towers of CLIP against transformers; configs; wrong weights."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recorded
from quick import jit

from diffusion_jax.errors import ConfigError
from diffusion_jax.evaluation.features import clip, transformer
from diffusion_jax.evaluation.features.clip import TowerOptions

TOLERANCE = 1e-5


def scaled(images):
    return transformer.normalise(jnp.asarray(images), clip.MEAN, clip.DEVIATION)


def test_both_towers_of_one_file():
    tensors, arrays = recorded.load("clip")
    pictures, texts = clip.build(tensors, "memory"), clip.build_text(tensors, "memory")
    images = jit(pictures.apply)(pictures.params, jnp.asarray(arrays["images"]))
    captions = jit(texts.apply)(texts.params, jnp.asarray(arrays["tokens"]))
    assert recorded.gap(images["normalised"], arrays["image_embeds"]) < TOLERANCE
    assert recorded.gap(captions["normalised"], arrays["text_embeds"]) < TOLERANCE
    lengths = np.linalg.norm(images["features"], axis=-1, keepdims=True)
    assert np.abs(lengths - 1).min() > 0.1
    np.testing.assert_allclose(images["features"] / lengths, images["normalised"], rtol=1e-5)
    logits = texts.logit_scale * np.asarray(captions["normalised"] @ images["normalised"].T)
    assert recorded.gap(logits, arrays["logits_per_text"]) < TOLERANCE
    assert (texts.length, texts.vocabulary) == (12, 99)
    assert (pictures.score, pictures.name) == ("FD-CLIP", "clip_vit_128_8_32")


def test_pictures_are_resized_and_cropped():
    tensors, arrays = recorded.load("clip")
    network = clip.build(tensors, "memory")
    ours = jit(network.apply)(network.params, jnp.asarray(arrays["odd"][None]))["features"]
    assert recorded.gap(ours, arrays["whole"]) < TOLERANCE


def test_picture_tower_by_itself_with_other_heads_and_activation():
    tensors, arrays = recorded.load("clip_vision")
    options = TowerOptions(activation="gelu", heads=4)
    network = clip.build(tensors, "memory", options=options)
    run = jit(lambda params, x: clip.image_features(params, x, options)["features"])
    ours = run(network.params, scaled(arrays["images"]))
    assert recorded.gap(ours, arrays["image_embeds"]) < TOLERANCE
    by_apply = jit(network.apply)(network.params, jnp.asarray(arrays["images"]))["features"]
    np.testing.assert_array_equal(by_apply, ours)
    quick = clip.image_features(
        network.params, scaled(arrays["images"]), TowerOptions(activation="quick_gelu", heads=4)
    )
    assert recorded.gap(quick["features"], arrays["image_embeds"]) > 1e-3


@pytest.mark.parametrize(("end", "name"), [(50, "text_embeds"), (2, "text_embeds_old")])
def test_where_a_text_ends(end, name):
    tensors, arrays = recorded.load("clip_text")
    options = TowerOptions(activation="gelu", heads=3, end_token=end)
    network = clip.build_text(tensors, "memory", options=options)
    assert network.logit_scale is None
    ours = jit(network.apply)(network.params, jnp.asarray(arrays["tokens"]))["features"]
    assert recorded.gap(ours, arrays[name]) < TOLERANCE
    assert recorded.gap(arrays["text_embeds"], arrays["text_embeds_old"]) > 0.1
    same = clip.text_features(network.params, jnp.asarray(arrays["tokens"]), options)["features"]
    np.testing.assert_allclose(same, ours, rtol=1e-4, atol=1e-5)


def test_what_fills_a_row_has_no_effect_and_unknown_tokens_give_nan():
    tensors, arrays = recorded.load("clip")
    network = clip.build_text(tensors, "memory")
    apply = jit(network.apply)
    tokens = arrays["tokens"].copy()
    before = apply(network.params, jnp.asarray(tokens))["features"]
    tokens[0, 4:] = 0
    after = apply(network.params, jnp.asarray(tokens))["features"]
    np.testing.assert_allclose(before, after, rtol=1e-5, atol=1e-6)
    tokens[1, 2] = 99
    found = apply(network.params, jnp.asarray(tokens))["features"]
    np.testing.assert_array_equal(np.isnan(found).any(-1), [False, True, False, False])


def test_options_of_a_config():
    both = {
        "text_config": {"hidden_act": "gelu", "num_attention_heads": 20, "eos_token_id": 49407},
        "vision_config": {"hidden_act": "gelu", "num_attention_heads": 16, "layer_norm_eps": 1e-6},
    }
    text = TowerOptions(activation="gelu", heads=20, end_token=49407)
    assert clip.options_of(both, "text") == text
    assert clip.options_of(both["text_config"], "text") == text
    vision = TowerOptions(activation="gelu", heads=16, epsilon=1e-6)
    assert clip.options_of(both, "vision") == vision
    assert clip.options_of({"text_config": None, "vision_config": None}, "text") == TowerOptions()
    old = {"text_config": None, "text_config_dict": {"hidden_act": "gelu"}}
    assert clip.options_of(old, "text").activation == "gelu"
    with pytest.raises(ConfigError, match="activation='relu' is unknown"):
        clip.options_of({"hidden_act": "relu"}, "vision")
    with pytest.raises(ConfigError, match="is not one token"):
        clip.options_of({"eos_token_id": [1, 2]}, "text")


def test_the_config_beside_a_file(tmp_path):
    tensors, arrays = recorded.load("clip_vision")
    path = tmp_path / "model.safetensors"
    assert clip.options_beside(path, "vision") is None
    config = {"hidden_act": "gelu", "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": config}))
    network = clip.build(tensors, str(path))
    ours = jit(network.apply)(network.params, jnp.asarray(arrays["images"]))["features"]
    assert recorded.gap(ours, arrays["image_embeds"]) < TOLERANCE
    for text in ("{", "[]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=r"config\.json: not"):
            clip.build(tensors, str(path))


# Parameters as counted in transformers.
PICTURES = {
    "clip_vit_b32": (768, 12, 3072, 32, 512, 87_849_216),
    "clip_vit_l14": (1024, 24, 4096, 14, 768, 303_966_208),
    "clip_vit_h14": (1280, 32, 5120, 14, 1024, 632_076_800),
}


def views(shapes):
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}


def one_block(start, width, hidden):
    block = f"{start}encoder.layers.0."
    shapes = {}
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        shapes |= {f"{block}self_attn.{name}.weight": (width, width)}
        shapes |= {f"{block}self_attn.{name}.bias": (width,)}
    shapes |= {f"{block}mlp.fc1.weight": (hidden, width), f"{block}mlp.fc1.bias": (hidden,)}
    shapes |= {f"{block}mlp.fc2.weight": (width, hidden), f"{block}mlp.fc2.bias": (width,)}
    for norm in ("layer_norm1", "layer_norm2"):
        shapes |= {f"{block}{norm}.weight": (width,), f"{block}{norm}.bias": (width,)}
    return shapes


def abstract(params, depth):
    """Parameters without values, with as many blocks."""
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    params["blocks"] = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((depth, *x.shape[1:]), x.dtype), params["blocks"]
    )
    return params


def size(params):
    return sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("name", PICTURES)
def test_published_picture_towers(name):
    width, depth, hidden, patch, projected, count = PICTURES[name]
    start = "vision_model."
    shapes = one_block(start, width, hidden) | {
        f"{start}embeddings.class_embedding": (width,),
        f"{start}embeddings.patch_embedding.weight": (width, 3, patch, patch),
        f"{start}embeddings.position_embedding.weight": (1 + (224 // patch) ** 2, width),
        f"{start}embeddings.position_ids": (1, 1 + (224 // patch) ** 2),
        "visual_projection.weight": (projected, width),
        "text_model.final_layer_norm.bias": (3,),
        "logit_scale": (),
    }
    for norm in ("pre_layrnorm", "post_layernorm"):
        shapes |= {f"{start}{norm}.weight": (width,), f"{start}{norm}.bias": (width,)}
    options = TowerOptions(activation="gelu") if width == 1280 else None
    network = clip.build(views(shapes), "memory", options=options)
    params = abstract(network.params, depth)
    assert (network.name, size(params)) == (name, count)
    images = jax.ShapeDtypeStruct((2, 48, 32, 3), jnp.uint8)
    found = jax.eval_shape(network.apply, params, images)
    assert found["features"].shape == found["normalised"].shape == (2, projected)


@pytest.mark.parametrize(
    ("width", "projected", "count"), [(512, 512, 63_428_096), (768, 768, 123_650_304)]
)
def test_published_text_towers(width, projected, count):
    start = "text_model."
    shapes = one_block(start, width, 4 * width) | {
        f"{start}embeddings.token_embedding.weight": (49408, width),
        f"{start}embeddings.position_embedding.weight": (77, width),
        f"{start}final_layer_norm.weight": (width,),
        f"{start}final_layer_norm.bias": (width,),
        "text_projection.weight": (projected, width),
    }
    network = clip.build_text(views(shapes), "memory")
    params = abstract(network.params, 12)
    assert size(params) == count
    found = jax.eval_shape(network.apply, params, jax.ShapeDtypeStruct((2, 77), jnp.int32))
    assert found["features"].shape == (2, projected)


def test_wrong_weights_are_refused_in_one_line():
    tensors, _ = recorded.load("clip")

    def refusal(changed, build=clip.build, **kw):
        with pytest.raises(ConfigError) as error:
            build(changed, "some.bin", **kw)
        message = str(error.value)
        assert "\n" not in message
        assert message.startswith("some.bin: not the weights of CLIP's ")
        assert " tensors, hash " in message
        return message

    norm = "vision_model.pre_layrnorm.bias"
    assert f"missing: {norm} (" in refusal({k: v for k, v in tensors.items() if k != norm})
    assert f"of another shape: {norm} [1] instead of [128] (" in refusal(
        {**tensors, norm: np.zeros(1)}
    )
    assert "unexpected: vision_model.x (" in refusal({**tensors, "vision_model.x": np.zeros(1)})
    assert "there is no visual_projection.weight" in refusal(
        {k: v for k, v in tensors.items() if k != "visual_projection.weight"}
    )
    assert "not a multiple of 3 heads" in refusal(tensors, options=TowerOptions(heads=3))
    table = "vision_model.embeddings.position_embedding.weight"
    assert "16 position embeddings" in refusal({**tensors, table: tensors[table][1:]})
    scale = {**tensors, "logit_scale": np.zeros(2, np.float32)}
    assert "of another shape: logit_scale [2] instead of []" in refusal(scale, clip.build_text)
    end = "text_model.final_layer_norm.weight"
    short = {k: v for k, v in tensors.items() if k != end}
    assert f"missing: {end} (" in refusal(short, clip.build_text)
    patch = "vision_model.embeddings.patch_embedding.weight"
    wide = {**tensors, patch: np.zeros((1280, 3, 8, 8), np.float32)}
    assert "none of OpenAI's" in refusal(wide)
