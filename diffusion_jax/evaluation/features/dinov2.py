"""DINOv2 (Oquab et al. 2023), optionally with registers (Darcet et al. 2023), for FD-DINOv2.

A vision transformer with LayerScale; the largest has SwiGLU instead of GELU. Features are the class
token after the last norm. Stein et al. 2023, who introduced the distance ("Exposing flaws of
generative model evaluation metrics"), take ViT-L/14 without registers, and resize to 224 x 224 by
PIL's bicubic with antialias, which rounds to 8 bits; the aspect ratio is not kept.

Sizes are found from the tensors, which are named as in the authors' files (`blocks.0.attn.qkv`), or
as in the files or the modules of transformers (`encoder.layer.0.attention...`).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion_jax.errors import unknown_name
from diffusion_jax.evaluation.features import resizing, transformer
from diffusion_jax.evaluation.features.protocol import FeatureNetwork, params_hash
from diffusion_jax.evaluation.features.weight_tensors import Tensors, linear_shapes, norm_shapes

Params = dict[str, Any]

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE = 224
EPSILON = 1e-6
HEAD = 64

POSITIONS = ("original", "transformers")
"""How position embeddings of another resolution are resized, bicubic. By the authors: without
registers the step is (old / (new + 0.1)), without antialias; with registers old / new, with
antialias. By transformers: old / new, with antialias where there are registers."""

# (width, depth, hidden width) -> letter; hidden is that before the gate of SwiGLU.
_PUBLISHED = {
    (384, 12, 1536): "s",
    (768, 12, 3072): "b",
    (1024, 24, 4096): "l",
    (1536, 40, 4096): "g",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Names:
    """What one kind of file calls its parts; lists are layers that stand beside each other here."""

    block: str
    embedding: str
    patch: str
    class_token: str
    positions: str
    registers: str
    norm: str
    qkv: tuple[str, ...]
    out: str
    scale: str
    gates: tuple[str, ...]
    down: str


_ORIGINAL = _Names(
    block="blocks.{}.",
    embedding="",
    patch="patch_embed.proj",
    class_token="cls_token",
    positions="pos_embed",
    registers="register_tokens",
    norm="norm",
    qkv=("attn.qkv",),
    out="attn.proj",
    scale="ls{}.gamma",
    gates=("mlp.w12",),
    down="mlp.w3",
)
_TRANSFORMERS = _Names(
    block="encoder.layer.{}.",
    embedding="embeddings.",
    patch="patch_embeddings.projection",
    class_token="cls_token",
    positions="position_embeddings",
    registers="register_tokens",
    norm="layernorm",
    qkv=("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    out="attention.output.dense",
    scale="layer_scale{}.lambda1",
    gates=("mlp.weights_in",),
    down="mlp.weights_out",
)
_TRANSFORMERS_MODULES = dataclasses.replace(
    _TRANSFORMERS,
    qkv=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    out="attention.o_proj",
    gates=("mlp.gate_proj", "mlp.up_proj"),
    down="mlp.down_proj",
)
_IGNORED = r"(embeddings\.)?mask_token$|classifier\."


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sizes:
    width: int
    depth: int
    hidden: int
    patch: int
    positions: int
    registers: int
    gated: bool

    @property
    def name(self) -> str:
        letter = _PUBLISHED.get((self.width, self.depth, self.hidden))
        letter = letter or f"{self.width}x{self.depth}_"
        return f"dinov2_vit{letter}{self.patch}" + ("_reg" if self.registers else "")


def build(
    tensors: Mapping[str, np.ndarray], path: str, *, positions: str | None = None
) -> FeatureNetwork:
    """The network of the tensors of a file.

    Args:
        tensors: name -> array, in any of the three namings.
        path: of the file, for messages.
        positions: one of `POSITIONS`; None is that of the library whose names the file has. The
            published values of FD-DINOv2 were computed with `original`.

    Returns:
        Its `apply` gives features [B, width].

    Raises:
        ConfigError: names, shapes or values do not fit, in one line with path and hash.
        ValueError: an unknown kind of positions.
    """
    if positions not in (None, *POSITIONS):
        raise ValueError(unknown_name("positions", str(positions), POSITIONS))
    held = Tensors({_renamed(name): value for name, value in tensors.items()}, path, "DINOv2")
    names = _naming(held)
    sizes = _sizes(held, names)
    held.check(_expected(names, sizes), _IGNORED)
    params = _params(held, names, sizes)
    positions = positions or ("original" if names is _ORIGINAL else "transformers")

    def apply(params: Params, images: Any) -> dict[str, Array]:
        resized = resizing.resize_uint8(jnp.asarray(images), (SIZE, SIZE), "bicubic")
        pixels = transformer.normalise(resized, MEAN, DEVIATION)
        return {"features": class_features(params, pixels, positions=positions)}

    return FeatureNetwork(
        name=sizes.name,
        score="FD-DINOv2",
        params=params,
        apply=apply,
        resize=f"bicubic {SIZE}x{SIZE}, antialias, rounded to uint8 (PIL, as dgm-eval); "
        f"position embeddings as {positions}",
        weights_hash=params_hash(params),
    )


def class_features(
    params: Params, pixels: Float[Array, "b h w 3"], *, positions: str
) -> Float[Array, "b width"]:
    """The class token after the last norm, of pictures that were scaled; sides divide by a patch.

    Args:
        params: as of `build`.
        pixels: after `transformer.normalise`.
        positions: one of `POSITIONS`.
    """
    params = transformer.on_device(params)
    with jax.default_matmul_precision("float32"):
        kernel = params["patch"]["kernel"]
        width = kernel.shape[-1]
        grid = tuple(size // kernel.shape[0] for size in pixels.shape[1:3])
        table = _position_table(params, grid, positions)
        x = transformer.patches(pixels, kernel) + params["patch"]["bias"] + table[1:]
        first = (params["class"] + table[0])[None]
        if "registers" in params:
            first = jnp.concatenate([first, params["registers"]])
        first = jnp.broadcast_to(first, (x.shape[0], *first.shape))
        x = jnp.concatenate([first, x], axis=1)
        x = transformer.blocks(
            params["blocks"], x, heads=width // HEAD, activation="gelu", epsilon=EPSILON
        )
        return transformer.layer_norm(params["norm"], x[:, 0], EPSILON)


def _position_table(params: Params, grid: tuple[int, ...], positions: str) -> Array:
    """Embeddings [1 + patches, width] for a grid of patches; the first is the class token's."""
    table = params["positions"]
    side = math.isqrt(table.shape[0] - 1)
    if grid == (side, side):
        return table
    smooth = "registers" in params
    # Their inverse of the step is rounded to single precision by PyTorch; this is not.
    margin = 0.1 if positions == "original" and not smooth else 0.0
    rows, columns = (
        jnp.asarray(
            resizing.interpolation_matrix(
                side,
                size,
                "bicubic",
                antialias=smooth,
                step=None if smooth else side / (size + margin),
            ),
            jnp.float32,
        )
        for size in grid
    )
    cells = table[1:].reshape(side, side, -1)
    resized = jnp.einsum("uh,vw,hwd->uvd", rows, columns, cells).reshape(-1, cells.shape[-1])
    return jnp.concatenate([table[:1], resized])


def _renamed(name: str) -> str:
    """Without the prefix of a classifier's backbone, or the chunks of blocks of training runs."""
    name = re.sub(r"^dinov2(_with_registers)?\.", "", name)
    return re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)


def _naming(held: Tensors) -> _Names:
    if "patch_embed.proj.weight" in held:
        return _ORIGINAL
    if "encoder.layer.0.attention.q_proj.weight" in held:
        return _TRANSFORMERS_MODULES
    return _TRANSFORMERS


def _sizes(held: Tensors, names: _Names) -> _Sizes:
    embedding, block = names.embedding, names.block.format(0)
    width, channels, patch, other = held.shape(f"{embedding}{names.patch}.weight", 4)
    if width % HEAD or patch != other or channels != 3:
        raise held.refused(
            f"{embedding}{names.patch}.weight is [{width}, {channels}, {patch}, {other}], not "
            f"[a multiple of {HEAD}, 3, patch, patch]"
        )
    if SIZE % patch:
        raise held.refused(f"patches of {patch} pixels do not divide pictures of {SIZE}")
    positions = held.shape(f"{embedding}{names.positions}", 3)[1]
    if math.isqrt(positions - 1) ** 2 != positions - 1 or positions == 1:
        raise held.refused(f"{positions} position embeddings are not one more than a square")
    registers = f"{embedding}{names.registers}"
    gated = f"{block}{names.down}.weight" in held
    inner = f"{block}{names.down if gated else 'mlp.fc2'}.weight"
    return _Sizes(
        width=width,
        depth=held.count(re.escape(names.block).replace(r"\{\}", r"(\d+)")),
        hidden=held.shape(inner, 2)[1],
        patch=patch,
        positions=positions,
        registers=held.shape(registers, 3)[1] if registers in held else 0,
        gated=gated,
    )


def _layers(names: _Names, sizes: _Sizes, number: int) -> dict[str, tuple[list[str], int, int]]:
    """Layer here -> (names there, inputs, outputs) in one block."""
    width, hidden = sizes.width, sizes.hidden
    layers = {"qkv": (names.qkv, width, 3 * width), "out": ((names.out,), width, width)}
    if sizes.gated:
        layers["gates"] = (names.gates, width, 2 * hidden)
        layers["fc2"] = ((names.down,), hidden, width)
    else:
        layers["fc1"] = (("mlp.fc1",), width, hidden)
        layers["fc2"] = (("mlp.fc2",), hidden, width)
    block = names.block.format(number)
    return {
        layer: ([block + name for name in there], inside, outside)
        for layer, (there, inside, outside) in layers.items()
    }


def _expected(names: _Names, sizes: _Sizes) -> dict[str, tuple[int, ...]]:
    width, embedding = sizes.width, names.embedding
    shapes: dict[str, tuple[int, ...]] = {
        f"{embedding}{names.class_token}": (1, 1, width),
        f"{embedding}{names.positions}": (1, sizes.positions, width),
        f"{embedding}{names.patch}.weight": (width, 3, sizes.patch, sizes.patch),
        f"{embedding}{names.patch}.bias": (width,),
    }
    if sizes.registers:
        shapes[f"{embedding}{names.registers}"] = (1, sizes.registers, width)
    for number in range(sizes.depth):
        block = names.block.format(number)
        for there, inside, outside in _layers(names, sizes, number).values():
            shapes |= linear_shapes(there, inside, outside)
        for i in (1, 2):
            shapes |= norm_shapes(f"{block}norm{i}", width)
            shapes[block + names.scale.format(i)] = (width,)
    return shapes | norm_shapes(names.norm, width)


def _params(held: Tensors, names: _Names, sizes: _Sizes) -> Params:
    def block(number: int) -> Params:
        start = names.block.format(number)
        layers = _layers(names, sizes, number)
        params: Params = {layer: held.linear(there) for layer, (there, _, _) in layers.items()}
        for i in (1, 2):
            params[f"norm{i}"] = held.norm(f"{start}norm{i}")
            params[f"scale{i}"] = held.float32(start + names.scale.format(i))
        return params

    embedding = names.embedding
    kernel = held.float32(f"{embedding}{names.patch}.weight")
    params: Params = {
        "patch": {
            "kernel": np.ascontiguousarray(kernel.transpose(2, 3, 1, 0)),
            "bias": held.float32(f"{embedding}{names.patch}.bias"),
        },
        "class": held.float32(f"{embedding}{names.class_token}")[0, 0],
        "positions": held.float32(f"{embedding}{names.positions}")[0],
        "blocks": transformer.stacked([block(number) for number in range(sizes.depth)]),
        "norm": held.norm(names.norm),
    }
    if sizes.registers:
        params["registers"] = held.float32(f"{embedding}{names.registers}")[0]
    return params
