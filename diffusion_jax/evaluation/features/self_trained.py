"""Features without downloaded weights: a small convolutional network trained on the reference data.

It learns the classes of the data, or where these have none by how many quarter turns a picture was
rotated (Gidaris et al. 2018). A Frechet distance over its features is called FD-self: comparable
between runs of the same data and weights hash, and with nothing published.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int32, Key, UInt8

from diffusion_jax.errors import ConfigError
from diffusion_jax.evaluation.features.protocol import OWN, FeatureNetwork, params_hash

PyTree = Any
CHANNELS = (32, 64, 128)
"""Of the convolutions; those after them have as many as the last. There are at least these."""
FEATURES = 64
STEPS = 1500
BATCH = 128
RATE = 2e-3
TURNS = 4
RECIPE = f"2 {CHANNELS} {FEATURES} {STEPS} {BATCH} {RATE}"
"""Of the training; kept weights of another are trained anew."""
NEEDED = 100
"""Examples to learn from, at least."""


def init(key: Key[Array, ""], classes: int, size: int) -> PyTree:
    """Random parameters of the network of `forward`, for pictures of 3 channels.

    Args:
        key: of the draw.
        classes: how many logits.
        size: larger side of the pictures; the more pixels, the more convolutions.
    """
    count = max(len(CHANNELS), _halvings(size))
    widths = (*CHANNELS, *[CHANNELS[-1]] * (count - len(CHANNELS)))
    keys = jax.random.split(key, count + 2)
    make = jax.nn.initializers.he_normal()
    params, before = {}, 3
    for number, channels in enumerate(widths):
        params[f"conv{number}"] = {
            "kernel": make(keys[number], (3, 3, before, channels)),
            "bias": jnp.zeros(channels),
        }
        before = channels
    for name, key, shape in (
        ("dense", keys[-2], (before, FEATURES)),
        ("classes", keys[-1], (FEATURES, classes)),
    ):
        params[name] = {"kernel": make(key, shape), "bias": jnp.zeros(shape[1])}
    return params


def _halvings(size: int) -> int:
    """Of the resolution until two pixels are left: then a feature has seen the whole picture."""
    return max(math.ceil(math.log2(size)) - 1, 1)


def maps(params: PyTree, pixels: UInt8[Array, "b h w 3"]) -> tuple[Float[Array, "b _ _ _"], ...]:
    """What each convolution puts out, at half the resolution of the one before; the first ones of
    small pictures, which would have none left, keep it."""
    x, found = pixels.astype(jnp.float32) / 127.5 - 1.0, []
    count = sum(name.startswith("conv") for name in params)
    whole = count - _halvings(max(pixels.shape[1:3]))
    for number in range(count):
        layer = params[f"conv{number}"]
        stride = (1, 1) if number < whole else (2, 2)
        numbers = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(
            x, layer["kernel"], stride, "SAME", dimension_numbers=numbers
        )
        x = jax.nn.relu(x + layer["bias"])
        found.append(x)
    return tuple(found)


def forward(params: PyTree, pixels: UInt8[Array, "b h w 3"]) -> dict[str, Float[Array, "b _"]]:
    """Features [B, 64] and logits of the classes, at the resolution of the pictures."""
    x = maps(params, pixels)[-1].mean((1, 2))
    features = jax.nn.gelu(x @ params["dense"]["kernel"] + params["dense"]["bias"])
    logits = features @ params["classes"]["kernel"] + params["classes"]["bias"]
    return {"features": features, "logits": logits}


def build(params: PyTree) -> FeatureNetwork:
    """The feature network of trained parameters."""
    params = jax.tree.map(lambda a: np.asarray(a, np.float32), params)
    return FeatureNetwork(
        name=OWN,
        score="FD-self",
        params=params,
        apply=forward,
        resize="none",
        weights_hash=params_hash(params),
        maps=maps,
    )


def check(count: int, size: tuple[int, int], *, by_class: bool) -> None:
    """Raises ConfigError unless a network can learn from so many pictures (height, width)."""
    if count < NEEDED:
        raise ConfigError(
            f"{count} examples: a feature network of the data itself needs at least {NEEDED}"
        )
    if not by_class and size[0] != size[1]:
        raise ConfigError(
            f"pictures of {size[0]} x {size[1]} without classes: quarter turns need square ones; "
            "name the weights of a feature network"
        )


def train(
    pixels: UInt8[np.ndarray, "n h w 3"],
    labels: Int32[np.ndarray, " n"] | None,
    classes: int,
    *,
    seed: int = 0,
    steps: int | None = None,
) -> FeatureNetwork:
    """Trains the network; the same data and seed give the same weights on the same machine.

    Args:
        pixels: the reference data.
        labels: of them, or None: then it learns quarter turns.
        classes: how many labels there are.
        seed: of the weights and batches.
        steps: of Adam, in batches of 128; 1,500 by default.

    Raises:
        ConfigError: fewer than 100 pictures, or quarter turns of pictures that are not square.
    """
    check(len(pixels), (pixels.shape[1], pixels.shape[2]), by_class=labels is not None)
    steps = STEPS if steps is None else steps
    root = jax.random.key(seed)
    params = init(root, TURNS if labels is None else classes, max(pixels.shape[1:3]))
    optimizer = optax.adam(optax.cosine_decay_schedule(RATE, steps))
    state = optimizer.init(params)
    step = jax.jit(functools.partial(_step, optimizer))
    random = np.random.default_rng(seed)
    for _ in range(steps):
        chosen = random.integers(0, len(pixels), BATCH)
        batch = np.asarray(pixels[chosen])
        if labels is None:
            params, state = step(params, state, *turned(batch))
        else:
            params, state = step(params, state, batch, labels[chosen])
    return build(params)


def turned(
    pixels: UInt8[np.ndarray, "n h h 3"],
) -> tuple[UInt8[np.ndarray, "n h h 3"], Int32[np.ndarray, " n"]]:
    """Pictures after 0 to 3 quarter turns, one after the other, and how many each had."""
    turns = np.arange(len(pixels), dtype=np.int32) % TURNS
    return np.stack([np.rot90(x, int(k)) for x, k in zip(pixels, turns, strict=True)]), turns


def _step(optimizer: Any, params: PyTree, state: PyTree, pixels: Any, labels: Any) -> Any:
    def loss(params: PyTree) -> Any:
        logits = forward(params, pixels)["logits"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    updates, state = optimizer.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state
