"""The Inception network of the original FID (Heusel et al. 2017, "GANs Trained by a Two Time-Scale
Update Rule Converge to a Local Nash Equilibrium").

It is TensorFlow's classifier of 2015-12-05, of which the pytorch-fid package publishes the weights
as `pt_inception-2015-12-05-6726825d.pth`. It differs from the Inception v3 of torchvision: 1008
classes, average pools that leave the padding out, and a max pool in the last block (Mixed_7c).

Outputs:
    features  [B, 2048]  "pool_3": the mean over the last 8x8 map
    spatial   [B, 2023]  the first 7 channels of "mixed_6/conv", 17x17, for sFID (Nash et al. 2021,
              "Generating Images with Sparse Representations"), flattened with channels last as the
              evaluator of guided-diffusion does. TensorFlow's mixed, mixed_1, ... mixed_10 are
              Mixed_5b, 5c, 5d, 6a, ... 7c, so mixed_6 is Mixed_6d; its op "conv" is the 1x1 branch
              after the ReLU, which comes first in the block's output.
    logits    [B, 1008]  features times the last matrix, *without* the bias: both the original
              Inception score (Salimans et al. 2016) and guided-diffusion take the softmax of the
              op "softmax/logits/MatMul", to which the bias has not been added.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion_jax.errors import ConfigError, unknown_name
from diffusion_jax.evaluation.features import convolutions as layers
from diffusion_jax.evaluation.features.bilinear import bilinear
from diffusion_jax.evaluation.features.protocol import HASH_DIGITS, FeatureNetwork, params_hash
from diffusion_jax.evaluation.features.weight_tensors import COUNTERS, Shape, Tensors

NAME = "inception_v3"
SIZE = 299
FEATURES = 2048
CLASSES = 1008
SPATIAL_BLOCK, SPATIAL_CHANNELS = "Mixed_6d", 7

# SHA-256 of the files whose network gives a distance the name FID.
PUBLISHED = {"6726825d0af5f729": "pt_inception-2015-12-05-6726825d.pth"}

RESIZES = {
    "pytorch_fid": "bilinear 299, half-pixel centres, no antialias, 2x/255 - 1 (pytorch-fid)",
    "tf1": "bilinear 299, no half-pixel centres, no antialias, (x - 128)/128 (TensorFlow 1 graph)",
}


class Conv(NamedTuple):
    """A convolution without bias, its batch normalisation and ReLU."""

    name: str
    channels: int
    size: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"


# A branch begins with a pool or with nothing, and its last part may fork.
Fork = tuple[Conv, ...]
Branch = tuple[str | Conv | Fork, ...]
Block = tuple[Branch, ...]

ROW, COLUMN = (1, 7), (7, 1)


def _halving(name: str, channels: int) -> Conv:
    return Conv(name, channels, (3, 3), stride=2, padding="VALID")


def _block_a(pooled: int) -> Block:
    return (
        (Conv("branch1x1", 64),),
        (Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, (5, 5))),
        (
            Conv("branch3x3dbl_1", 64),
            Conv("branch3x3dbl_2", 96, (3, 3)),
            Conv("branch3x3dbl_3", 96, (3, 3)),
        ),
        ("average", Conv("branch_pool", pooled)),
    )


def _block_c(inner: int) -> Block:
    return (
        (Conv("branch1x1", 192),),
        (
            Conv("branch7x7_1", inner),
            Conv("branch7x7_2", inner, ROW),
            Conv("branch7x7_3", 192, COLUMN),
        ),
        (
            Conv("branch7x7dbl_1", inner),
            Conv("branch7x7dbl_2", inner, COLUMN),
            Conv("branch7x7dbl_3", inner, ROW),
            Conv("branch7x7dbl_4", inner, COLUMN),
            Conv("branch7x7dbl_5", 192, ROW),
        ),
        ("average", Conv("branch_pool", 192)),
    )


def _block_e(pool: str) -> Block:
    def fork(name: str) -> Fork:
        return (Conv(f"{name}a", 384, (1, 3)), Conv(f"{name}b", 384, (3, 1)))

    return (
        (Conv("branch1x1", 320),),
        (Conv("branch3x3_1", 384), fork("branch3x3_2")),
        (
            Conv("branch3x3dbl_1", 448),
            Conv("branch3x3dbl_2", 384, (3, 3)),
            fork("branch3x3dbl_3"),
        ),
        (pool, Conv("branch_pool", 192)),
    )


STEM: Branch = (
    _halving("Conv2d_1a_3x3", 32),
    Conv("Conv2d_2a_3x3", 32, (3, 3), padding="VALID"),
    Conv("Conv2d_2b_3x3", 64, (3, 3)),
    "halve",
    Conv("Conv2d_3b_1x1", 80),
    Conv("Conv2d_4a_3x3", 192, (3, 3), padding="VALID"),
    "halve",
)
BLOCKS: dict[str, Block] = {
    "Mixed_5b": _block_a(32),
    "Mixed_5c": _block_a(64),
    "Mixed_5d": _block_a(64),
    "Mixed_6a": (
        (_halving("branch3x3", 384),),
        (
            Conv("branch3x3dbl_1", 64),
            Conv("branch3x3dbl_2", 96, (3, 3)),
            _halving("branch3x3dbl_3", 96),
        ),
        ("halve",),
    ),
    "Mixed_6b": _block_c(128),
    "Mixed_6c": _block_c(160),
    "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": (
        (Conv("branch3x3_1", 192), _halving("branch3x3_2", 320)),
        (
            Conv("branch7x7x3_1", 192),
            Conv("branch7x7x3_2", 192, ROW),
            Conv("branch7x7x3_3", 192, COLUMN),
            _halving("branch7x7x3_4", 192),
        ),
        ("halve",),
    ),
    "Mixed_7b": _block_e("average"),
    "Mixed_7c": _block_e("max"),
}
POOLS = {
    "average": layers.average_pool,
    "max": partial(layers.max_pool, stride=1, padding="SAME"),
    "halve": partial(layers.max_pool, stride=2, padding="VALID"),
}


def build(
    tensors: Mapping[str, np.ndarray], path: str, *, resize: str = "pytorch_fid"
) -> FeatureNetwork:
    """The network with the tensors of the file at `path` (names as in pytorch-fid's).

    A distance over it is called FID only if `path` is the published file itself, told by its
    SHA-256, and FD-Inception otherwise.

    Args:
        resize: "pytorch_fid", or "tf1" as in the original graph, which Heusel et al. and
            guided-diffusion run.

    Raises:
        ConfigError: names, shapes or values do not fit (torchvision's weights have 1000 classes),
            or an unknown `resize`.
    """
    if resize not in RESIZES:
        raise ConfigError(unknown_name("resize", resize, RESIZES))
    held, expected = Tensors(tensors, path, NAME), shapes()
    held.check(expected, ignored=COUNTERS)
    params = held.tree(expected)
    return FeatureNetwork(
        name=NAME,
        score="FID" if _file_hash(path) in PUBLISHED else "FD-Inception",
        params=params,
        apply=partial(apply, resize=resize),
        resize=RESIZES[resize],
        weights_hash=params_hash(params),
    )


def _file_hash(path: str) -> str | None:
    """16 hexadecimal digits of a file's SHA-256; None where there is no such file."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:HASH_DIGITS]
    except OSError:
        return None


def shapes() -> dict[str, Shape]:
    """Name in the file -> shape, in PyTorch's order of axes."""
    found: dict[str, Shape] = {}
    channels = _branch_shapes(found, "", STEM, 3)
    for name, block in BLOCKS.items():
        channels = sum(_branch_shapes(found, f"{name}.", branch, channels) for branch in block)
    return {**found, "fc.weight": (CLASSES, FEATURES), "fc.bias": (CLASSES,)}


def _branch_shapes(found: dict[str, Shape], prefix: str, branch: Branch, channels: int) -> int:
    for part in branch:
        if isinstance(part, str):
            continue
        convs = (part,) if isinstance(part, Conv) else part
        for conv in convs:
            found[f"{prefix}{conv.name}.conv.weight"] = (conv.channels, channels, *conv.size)
            for entry in ("weight", "bias", "running_mean", "running_var"):
                found[f"{prefix}{conv.name}.bn.{entry}"] = (conv.channels,)
        channels = sum(conv.channels for conv in convs)
    return channels


def apply(
    params: Any, pictures: Array | np.ndarray, *, resize: str = "pytorch_fid"
) -> dict[str, Float[Array, "b d"]]:
    """Features, spatial features and logits of pictures of any size, uint8 [B, H, W, 3].

    Raises:
        ValueError: another type or shape.
    """
    x = layers.floats(pictures)
    if resize == "tf1":
        return _network(params, (bilinear(x, SIZE, half_pixel=False) - 128) / 128)
    return _network(params, 2 * bilinear(x / 255, SIZE, half_pixel=True) - 1)


# Compiled apart from the resizing, once for pictures of all sizes.
@jax.jit
def _network(params: Any, x: Float[Array, "b 299 299 3"]) -> dict[str, Float[Array, "b d"]]:
    outputs = {}
    x = _run_branch(params, STEM, x)
    for name, block in BLOCKS.items():
        x = jnp.concatenate([_run_branch(params[name], branch, x) for branch in block], -1)
        if name == SPATIAL_BLOCK:
            outputs["spatial"] = x[..., :SPATIAL_CHANNELS].reshape(x.shape[0], -1)
    features = x.mean((1, 2))
    highest = jax.lax.Precision.HIGHEST
    logits = jnp.matmul(features, params["fc"]["weight"], precision=highest)
    return {"features": features, **outputs, "logits": logits}


def _run_branch(params: Any, branch: Branch, x: Array) -> Array:
    for part in branch:
        if isinstance(part, str):
            x = POOLS[part](x)
        elif isinstance(part, Conv):
            x = _run_conv(params, part, x)
        else:
            x = jnp.concatenate([_run_conv(params, conv, x) for conv in part], -1)
    return x


def _run_conv(params: Any, conv: Conv, x: Array) -> Array:
    entry = params[conv.name]
    x = layers.convolve(x, entry["conv"]["weight"], stride=conv.stride, padding=conv.padding)
    return jax.nn.relu(layers.normalise(x, entry["bn"]))
