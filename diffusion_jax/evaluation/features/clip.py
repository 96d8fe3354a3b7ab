"""CLIP (Radford et al. 2021): pictures and captions as vectors of one space.

The picture tower is a vision transformer with a norm before its blocks, whose class token is
normalised and projected; the text tower is a causal transformer, read at the end of the text. Names
are those of transformers (`vision_model...`, `text_model...`), in files of both towers or of one.

Sizes are found from the tensors. What they do not tell is in `TowerOptions`: by default that of
the `config.json` beside the file, as transformers writes it, else OpenAI's.

"features" of pictures are projected, but not normalised, as clean-fid's CLIP-FD takes them;
"normalised" has unit length, as CMMD (Jayasumana et al. 2024) takes them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from diffusion_jax.errors import ConfigError, unknown_name
from diffusion_jax.evaluation.features import resizing, transformer
from diffusion_jax.evaluation.features.protocol import FeatureNetwork, params_hash
from diffusion_jax.evaluation.features.weight_tensors import Tensors, linear_shapes, norm_shapes

Params = dict[str, Any]

MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
OLD_END = 2
"""`eos_token_id` in the configs of models converted before transformers 4.31: the end of a text is
where its largest token stands. With any other it is where that token stands first."""

_HEAD = 64
# Widths of picture towers whose heads are larger: all have 16.
_SIXTEEN_HEADS = (1280, 1408, 1664)
# Widths of towers that OpenAI did not publish, but others did, with either activation.
_NOT_OPENAI = {"vision": _SIXTEEN_HEADS, "text": (1024, 1280)}
_PUBLISHED = {
    (768, 32, 224): "b32",
    (768, 16, 224): "b16",
    (1024, 14, 224): "l14",
    (1024, 14, 336): "l14_336",
    (1280, 14, 224): "h14",
    (1408, 14, 224): "g14",
    (1664, 14, 224): "bigg14",
}
_VISION, _TEXT = "vision_model.", "text_model."
_LAYERS = {"qkv": ("q_proj", "k_proj", "v_proj"), "out": ("out_proj",)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerOptions:
    """What the tensors of a tower do not tell.

    Attributes:
        activation: `quick_gelu` (OpenAI) or `gelu` (most of OpenCLIP).
        heads: of the attention; None: width / 64, but 16 for the widest picture towers.
        epsilon: of the norms.
        end_token: of a text, `OLD_END` for the largest of its tokens. For the text tower.
    """

    activation: str = "quick_gelu"
    heads: int | None = None
    epsilon: float = 1e-5
    end_token: int = OLD_END

    def __post_init__(self) -> None:
        if self.activation not in transformer.ACTIVATIONS:
            known = transformer.ACTIVATIONS
            raise ConfigError(unknown_name("activation", self.activation, known))

    def __str__(self) -> str:
        """Of what pictures' features depend on."""
        heads = "" if self.heads is None else f"{self.heads} heads, "
        return f"{self.activation}, {heads}epsilon {self.epsilon:g}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextNetwork:
    """Captions in, features out.

    Attributes:
        params: a nested dict of float32 arrays.
        apply: `(params, tokens int [B, length]) -> {"features", "normalised"}`, each [B, D]; pure.
        length: the most tokens of a caption, with start and end.
        vocabulary: one more than the largest token.
        logit_scale: by which the products of normalised features were multiplied in training, e to
            the power of the file's; None where the file has none.
        weights_hash: `params_hash(params)`.
        options: what its features depend on besides, in words.
    """

    params: Params
    apply: Callable[[Params, Any], Mapping[str, Any]]
    length: int
    vocabulary: int
    logit_scale: float | None
    weights_hash: str
    options: str = ""


def options_of(config: Mapping[str, Any], tower: str) -> TowerOptions:
    """The options in a config of transformers, of both towers or of one.

    Args:
        config: as parsed from `config.json`.
        tower: "vision" or "text".

    Raises:
        ConfigError: an activation that is not known here, or several tokens that end a text.
    """
    part = config
    if f"{tower}_config" in config:
        part = config[f"{tower}_config"] or config.get(f"{tower}_config_dict") or {}
    # What a config does not say is transformers' default, which is TowerOptions', but for the end:
    # configs that were written before there was another default do not name it.
    found = {
        "activation": part.get("hidden_act"),
        "heads": part.get("num_attention_heads"),
        "epsilon": part.get("layer_norm_eps"),
        "end_token": part.get("eos_token_id"),
    }
    if not isinstance(found["end_token"], int | None):
        raise ConfigError(f"eos_token_id={found['end_token']!r} is not one token")
    return TowerOptions(**{name: value for name, value in found.items() if value is not None})


def options_beside(path: str | os.PathLike[str], tower: str) -> TowerOptions | None:
    """`options_of` the `config.json` in the folder of a file; None where there is none.

    Raises:
        ConfigError: it is not JSON, or names an unknown activation.
    """
    file = Path(path).parent / "config.json"
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file}: not JSON ({error})") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{file}: not the config of a network")
    return options_of(config, tower)


def build(
    tensors: Mapping[str, np.ndarray], path: str, *, options: TowerOptions | None = None
) -> FeatureNetwork:
    """The picture tower of the tensors of a file.

    Args:
        tensors: name -> array; those of a text tower are left out.
        path: of the file, for messages, and to look for a `config.json` beside it.
        options: None is what that says, or OpenAI's where there is none.

    Returns:
        Its `apply` gives features [B, D] and normalised [B, D].

    Raises:
        ConfigError: names, shapes or values do not fit, in one line with path and hash; or there
            are no options for a network that OpenAI did not publish.
    """
    held = Tensors(tensors, path, "CLIP's picture tower")
    width, patch, side = _picture_sizes(held)
    options, assumed = _options(held, path, "vision", width, options)
    heads = options.heads or (16 if width in _SIXTEEN_HEADS else width // _HEAD)
    params = _picture_params(held, width, patch, side, heads)
    known = dataclasses.replace(options, heads=heads)
    size = side * patch

    def apply(params: Params, images: Any) -> dict[str, Array]:
        resized = resizing.resize_and_crop_uint8(jnp.asarray(images), size, "bicubic")
        return image_features(params, transformer.normalise(resized, MEAN, DEVIATION), known)

    return FeatureNetwork(
        name=f"clip_vit_{_PUBLISHED.get((width, patch, size), f'{width}_{patch}_{size}')}",
        score="FD-CLIP",
        params=params,
        apply=apply,
        resize=f"bicubic, shorter side {size}, antialias, rounded to uint8, centre crop "
        "(PIL, as clean-fid)",
        weights_hash=params_hash(params),
        options=str(known),
        remark=assumed,
    )


def _options(
    held: Tensors, path: str, tower: str, width: int, given: TowerOptions | None
) -> tuple[TowerOptions, str]:
    """Those of a tower, and what of them was assumed: others, too, published networks of OpenAI's
    widths, with another activation (as LAION's B/32, B/16 and L/14)."""
    options = given or options_beside(path, tower)
    if options is not None:
        return options, ""
    if width in _NOT_OPENAI[tower]:
        raise held.refused(
            f"width {width} is none of OpenAI's, and activations differ; put its config.json "
            "beside it, or pass TowerOptions(activation=...)"
        )
    options = TowerOptions()
    return options, f"{options.activation} assumed: no config.json beside the file says which"


def _picture_sizes(held: Tensors) -> tuple[int, int, int]:
    """Width, pixels of a patch, patches along a side."""
    width, channels, patch, other = held.shape(f"{_VISION}embeddings.patch_embedding.weight", 4)
    if channels != 3 or patch != other:
        raise held.refused(f"patches are [{channels}, {patch}, {other}], not [3, size, size]")
    positions = held.shape(f"{_VISION}embeddings.position_embedding.weight", 2)[0]
    side = math.isqrt(positions - 1)
    if side**2 != positions - 1 or not side:
        raise held.refused(f"{positions} position embeddings are not one more than a square")
    return width, patch, side


def _picture_params(held: Tensors, width: int, patch: int, side: int, heads: int) -> Params:
    projected = held.shape("visual_projection.weight", 2)[0]
    shapes = _block_shapes(held, _VISION, width, heads) | {
        f"{_VISION}embeddings.class_embedding": (width,),
        f"{_VISION}embeddings.patch_embedding.weight": (width, 3, patch, patch),
        f"{_VISION}embeddings.position_embedding.weight": (1 + side**2, width),
        **norm_shapes(f"{_VISION}pre_layrnorm", width),
        **norm_shapes(f"{_VISION}post_layernorm", width),
        **linear_shapes(["visual_projection"], width, projected, bias=False),
    }
    held.check(shapes, r"text_model\.|text_projection\.|logit_scale$|.*\.position_ids$")
    kernel = held.float32(f"{_VISION}embeddings.patch_embedding.weight").transpose(2, 3, 1, 0)
    return {
        "patch": np.ascontiguousarray(kernel),
        "class": held.float32(f"{_VISION}embeddings.class_embedding"),
        "positions": held.float32(f"{_VISION}embeddings.position_embedding.weight"),
        "norm_before": held.norm(f"{_VISION}pre_layrnorm"),
        "blocks": _blocks(held, _VISION),
        "norm": held.norm(f"{_VISION}post_layernorm"),
        "projection": held.linear(["visual_projection"], bias=False),
    }


def image_features(
    params: Params, pixels: Float[Array, "b size size 3"], options: TowerOptions
) -> dict[str, Float[Array, "b d"]]:
    """Features, and normalised ones, of pictures that were scaled; `options` with heads."""
    params = transformer.on_device(params)
    with jax.default_matmul_precision("float32"):
        x = transformer.patches(pixels, params["patch"])
        first = jnp.broadcast_to(params["class"], (x.shape[0], 1, x.shape[-1]))
        x = jnp.concatenate([first, x], axis=1) + params["positions"]
        x = transformer.layer_norm(params["norm_before"], x, options.epsilon)
        x = _through(params["blocks"], x, options, causal=False)
        x = transformer.layer_norm(params["norm"], x[:, 0], options.epsilon)
        return _projected(params, x)


def build_text(
    tensors: Mapping[str, np.ndarray], path: str, *, options: TowerOptions | None = None
) -> TextNetwork:
    """The text tower of the tensors of a file.

    Args:
        tensors: name -> array; those of a picture tower are left out.
        path, options: as of `build`.

    Raises:
        ConfigError: names, shapes or values do not fit, in one line with path and hash.
    """
    held = Tensors(tensors, path, "CLIP's text tower")
    vocabulary, width = held.shape(f"{_TEXT}embeddings.token_embedding.weight", 2)
    length = held.shape(f"{_TEXT}embeddings.position_embedding.weight", 2)[0]
    options, assumed = _options(held, path, "text", width, options)
    heads = options.heads or width // _HEAD
    shapes = _block_shapes(held, _TEXT, width, heads)
    projected = held.shape("text_projection.weight", 2)[0]
    shapes |= {
        f"{_TEXT}embeddings.token_embedding.weight": (vocabulary, width),
        f"{_TEXT}embeddings.position_embedding.weight": (length, width),
        **norm_shapes(f"{_TEXT}final_layer_norm", width),
        **linear_shapes(["text_projection"], width, projected, bias=False),
    }
    if "logit_scale" in held:
        shapes["logit_scale"] = ()
    held.check(shapes, r"vision_model\.|visual_projection\.|.*\.position_ids$")
    params = {
        "tokens": held.float32(f"{_TEXT}embeddings.token_embedding.weight"),
        "positions": held.float32(f"{_TEXT}embeddings.position_embedding.weight"),
        "blocks": _blocks(held, _TEXT),
        "norm": held.norm(f"{_TEXT}final_layer_norm"),
        "projection": held.linear(["text_projection"], bias=False),
    }
    known = dataclasses.replace(options, heads=heads)

    def apply(params: Params, tokens: Any) -> dict[str, Array]:
        return text_features(params, jnp.asarray(tokens), known)

    return TextNetwork(
        params=params,
        apply=apply,
        length=length,
        vocabulary=vocabulary,
        logit_scale=float(np.exp(held.float32("logit_scale"))) if "logit_scale" in held else None,
        weights_hash=params_hash(params),
        options=", ".join(filter(None, [str(known), f"end token {known.end_token}", assumed])),
    )


def text_features(
    params: Params, tokens: Int[Array, "b n"], options: TowerOptions | None = None
) -> dict[str, Float[Array, "b d"]]:
    """Features, and normalised ones, of captions as tokens.

    What stands behind the end of a caption has no effect. A token that the network does not have
    gives NaN.

    Args:
        params: as of `build_text`.
        tokens: start, caption, end, and whatever fills the row; n at most the network's length.
        options: None is OpenAI's.
    """
    options = options or TowerOptions()
    params = transformer.on_device(params)
    with jax.default_matmul_precision("float32"):
        x = jnp.take(params["tokens"], tokens, axis=0, mode="fill")
        x = x + params["positions"][: tokens.shape[1]]
        x = _through(params["blocks"], x, options, causal=True)
        x = transformer.layer_norm(params["norm"], x, options.epsilon)
        old = options.end_token == OLD_END
        end = jnp.argmax(tokens if old else tokens == options.end_token, axis=1)
        return _projected(params, jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0])


def _through(stack: Params, x: Array, options: TowerOptions, *, causal: bool) -> Array:
    return transformer.blocks(
        stack,
        x,
        heads=options.heads or x.shape[-1] // _HEAD,
        activation=options.activation,
        epsilon=options.epsilon,
        causal=causal,
    )


def _projected(params: Params, x: Array) -> dict[str, Array]:
    features = transformer.linear(params["projection"], x)
    return {"features": features, "normalised": transformer.unit_length(features)}


def _depth(held: Tensors, start: str) -> int:
    return held.count(re.escape(start) + r"encoder\.layers\.(\d+)\.")


def _block_shapes(held: Tensors, start: str, width: int, heads: int) -> dict[str, tuple[int, ...]]:
    if not heads or width % heads:
        raise held.refused(f"width {width} is not a multiple of {heads} heads")
    hidden = held.shape(f"{start}encoder.layers.0.mlp.fc1.weight", 2)[0]
    shapes: dict[str, tuple[int, ...]] = {}
    for number in range(_depth(held, start)):
        block = f"{start}encoder.layers.{number}."
        for there in _LAYERS.values():
            names = [f"{block}self_attn.{name}" for name in there]
            shapes |= linear_shapes(names, width, len(there) * width)
        shapes |= linear_shapes([f"{block}mlp.fc1"], width, hidden)
        shapes |= linear_shapes([f"{block}mlp.fc2"], hidden, width)
        for i in (1, 2):
            shapes |= norm_shapes(f"{block}layer_norm{i}", width)
    return shapes


def _blocks(held: Tensors, start: str) -> Params:
    def block(number: int) -> Params:
        names = f"{start}encoder.layers.{number}."
        return {
            **{
                layer: held.linear([f"{names}self_attn.{name}" for name in there])
                for layer, there in _LAYERS.items()
            },
            "fc1": held.linear([f"{names}mlp.fc1"]),
            "fc2": held.linear([f"{names}mlp.fc2"]),
            "norm1": held.norm(f"{names}layer_norm1"),
            "norm2": held.norm(f"{names}layer_norm2"),
        }

    return dict(transformer.stacked([block(i) for i in range(_depth(held, start))]))
