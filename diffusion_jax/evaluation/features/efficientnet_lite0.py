"""EfficientNet-Lite0, a small ImageNet classifier (Tan & Le 2019, "EfficientNet: Rethinking Model
Scaling for Convolutional Neural Networks"; the Lite variant has ReLU6 and no squeeze-excitation).

Names are those of the PyTorch conversion (`_conv_stem`, `_blocks.0._depthwise_conv`, ...). A
distance over it is never a FID: it is called FD-EffNetLite0.

Outputs:
    features  [B, 1280]  the mean over the last 7x7 map
    logits    [B, 1000]  ImageNet classes

Its maps are those of the last block at each resolution: 112x112x16, 56x56x24, 28x28x40, 14x14x112
and 7x7x320.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion_jax.evaluation.features import convolutions as layers
from diffusion_jax.evaluation.features.bilinear import antialiased
from diffusion_jax.evaluation.features.protocol import FeatureNetwork, params_hash
from diffusion_jax.evaluation.features.weight_tensors import COUNTERS, Shape, Tensors

NAME = "efficientnet_lite0"
SCORE = "FD-EffNetLite0"
RESIZE = "bilinear 224, half-pixel centres, antialiased where it shrinks, (x - 127)/128"
SIZE = 224
STEM, HEAD, CLASSES = 32, 1280, 1000

# (blocks, kernel size, stride of the first, expansion, channels) of each stage.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class Block(NamedTuple):
    """An inverted residual: widen, convolve each channel by itself, narrow; `x +` where it fits."""

    channels: int
    out_channels: int
    size: int
    stride: int
    expansion: int

    @property
    def width(self) -> int:
        return self.channels * self.expansion

    @property
    def residual(self) -> bool:
        return self.stride == 1 and self.channels == self.out_channels


def blocks() -> Iterator[Block]:
    channels = STEM
    for repeats, size, stride, expansion, out_channels in STAGES:
        for i in range(repeats):
            yield Block(channels, out_channels, size, stride if i == 0 else 1, expansion)
            channels = out_channels


def build(tensors: Mapping[str, np.ndarray], path: str) -> FeatureNetwork:
    """The network with the tensors of the file at `path`.

    Raises:
        ConfigError: names, shapes or values do not fit.
    """
    held, expected = Tensors(tensors, path, NAME), shapes()
    held.check(expected, ignored=COUNTERS)
    params = held.tree(expected)
    return FeatureNetwork(
        name=NAME,
        score=SCORE,
        params=params,
        apply=apply,
        resize=RESIZE,
        weights_hash=params_hash(params),
        maps=maps,
    )


def shapes() -> dict[str, Shape]:
    """Name in the file -> shape, in PyTorch's order of axes."""
    found: dict[str, Shape] = {}

    def add(conv: str, norm: str, shape: Shape) -> None:
        found[f"{conv}.weight"] = shape
        for entry in ("weight", "bias", "running_mean", "running_var"):
            found[f"{norm}.{entry}"] = shape[:1]

    add("_conv_stem", "_bn0", (STEM, 3, 3, 3))
    for i, block in enumerate(blocks()):
        prefix, width = f"_blocks.{i}.", block.width
        if block.expansion != 1:
            add(f"{prefix}_expand_conv", f"{prefix}_bn0", (width, block.channels, 1, 1))
        add(f"{prefix}_depthwise_conv", f"{prefix}_bn1", (width, 1, block.size, block.size))
        add(f"{prefix}_project_conv", f"{prefix}_bn2", (block.out_channels, width, 1, 1))
    add("_conv_head", "_bn1", (HEAD, STAGES[-1][-1], 1, 1))
    return {**found, "_fc.weight": (CLASSES, HEAD), "_fc.bias": (CLASSES,)}


def apply(params: Any, pictures: Array | np.ndarray) -> dict[str, Float[Array, "b d"]]:
    """Features and logits of pictures of any size, uint8 [B, H, W, 3].

    Raises:
        ValueError: another type or shape.
    """
    return _network(params, _scaled(pictures))


def maps(params: Any, pictures: Array | np.ndarray) -> tuple[Float[Array, "b _ _ _"], ...]:
    """What the last block at each resolution puts out, of pictures as of `apply`."""
    return _maps(params, _scaled(pictures))


def _scaled(pictures: Array | np.ndarray) -> Float[Array, "b 224 224 3"]:
    return (antialiased(layers.floats(pictures), SIZE) - 127) / 128


# Compiled apart from the resizing, once for pictures of all sizes.
@jax.jit
def _network(params: Any, x: Float[Array, "b 224 224 3"]) -> dict[str, Float[Array, "b d"]]:
    x = _maps(params, x)[-1]
    features = _step(params, "_conv_head", "_bn1", x).mean((1, 2))
    highest = jax.lax.Precision.HIGHEST
    logits = jnp.matmul(features, params["_fc"]["weight"], precision=highest)
    return {"features": features, "logits": logits + params["_fc"]["bias"]}


@jax.jit
def _maps(params: Any, x: Float[Array, "b 224 224 3"]) -> tuple[Float[Array, "b _ _ _"], ...]:
    x = _step(params, "_conv_stem", "_bn0", x, stride=2)
    found: list[Array] = []
    for i, block in enumerate(blocks()):
        if block.stride != 1:
            found.append(x)
        x = _run_block(params["_blocks"][str(i)], block, x)
    return (*found, x)


def _run_block(params: Any, block: Block, x: Array) -> Array:
    hidden = _step(params, "_expand_conv", "_bn0", x) if block.expansion != 1 else x
    hidden = layers.depthwise(hidden, params["_depthwise_conv"]["weight"], stride=block.stride)
    hidden = jax.nn.relu6(layers.normalise(hidden, params["_bn1"]))
    narrow = layers.convolve(hidden, params["_project_conv"]["weight"])
    narrow = layers.normalise(narrow, params["_bn2"])
    return x + narrow if block.residual else narrow


def _step(params: Any, conv: str, norm: str, x: Array, *, stride: int = 1) -> Array:
    x = layers.convolve(x, params[conv]["weight"], stride=stride)
    return jax.nn.relu6(layers.normalise(x, params[norm]))
