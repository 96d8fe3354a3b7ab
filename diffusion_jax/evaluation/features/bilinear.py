"""Bilinear resizing as the authors of feature networks do it.

They differ in where an output pixel lies among the input's, and a Frechet distance notices (Parmar
et al. 2022, "On Aliased Resizing and Surprising Subtleties in GAN Evaluation"). With the scale
s = size_in / size_out, output pixel i reads the input at

    (i + 1/2) s - 1/2   half-pixel centres: PyTorch (align_corners=False), TensorFlow 2   (1)
    i s                 TensorFlow 1                                                      (2)

between the two nearest pixels, however many lie in between: without antialiasing.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def bilinear(
    x: Float[Array, "b h w c"], size: int, *, half_pixel: bool
) -> Float[Array, "b {size} {size} c"]:
    """Resizes to `size` x `size` without antialiasing, by (1) or, without `half_pixel`, (2)."""
    rows, columns = (_weights(length, size, half_pixel) for length in x.shape[1:3])
    highest = jax.lax.Precision.HIGHEST
    x = jnp.einsum("ph,bhwc->bpwc", rows, x, precision=highest)
    return jnp.einsum("qw,bpwc->bpqc", columns, x, precision=highest)


def antialiased(x: Float[Array, "b h w c"], size: int) -> Float[Array, "b {size} {size} c"]:
    """Resizes to `size` x `size` by (1), with a filter as wide as s where that is above 1."""
    shape = (x.shape[0], size, size, x.shape[3])
    return jax.image.resize(x, shape, "linear", antialias=True)


def _weights(length: int, size: int, half_pixel: bool) -> np.ndarray:
    # In single precision throughout, as PyTorch and TensorFlow do.
    scale = np.float32(length) / np.float32(size)
    at = np.arange(size, dtype=np.float32)
    if half_pixel:
        at = np.maximum((at + np.float32(0.5)) * scale - np.float32(0.5), np.float32(0.0))
    else:
        at = at * scale
    below = np.minimum(at.astype(np.int64), length - 1)
    above = np.minimum(below + 1, length - 1)
    fraction = (at - below).astype(np.float32)
    weights = np.zeros((size, length), np.float32)
    np.add.at(weights, (np.arange(size), below), 1 - fraction)
    np.add.at(weights, (np.arange(size), above), fraction)
    return weights
