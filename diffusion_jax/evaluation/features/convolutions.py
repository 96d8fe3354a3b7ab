"""Layers of trained convolutional classifiers: NHWC, single precision on every device."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# TensorFlow's, in all networks that come from there; PyTorch's default is 1e-5.
BATCH_NORM_EPSILON = 1e-3


def convolve(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "kh kw i d"],
    *,
    stride: int = 1,
    padding: str = "SAME",
) -> Float[Array, "b p q d"]:
    """Cross-correlation, padded as TensorFlow's SAME (for stride 2: more behind) or VALID."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        # Accelerators multiply in fewer bits by default, and a Frechet distance would show it.
        precision=jax.lax.Precision.HIGHEST,
    )


def depthwise(
    x: Float[Array, "b h w c"], kernel: Float[Array, "kh kw 1 c"], *, stride: int = 1
) -> Float[Array, "b p q c"]:
    """Each channel by itself, padded as `convolve` does, as a sum over the pixels of the kernel.

    XLA's grouped convolution takes several times as long on CPU.
    """
    sizes = [-(-side // stride) for side in x.shape[1:3]]
    ends = [(size - 1) * stride + 1 for size in sizes]
    # What the last step needs, the larger half behind.
    lacking = [
        max(0, end - 1 + width - side)
        for end, width, side in zip(ends, kernel.shape, x.shape[1:3], strict=False)
    ]
    x = jnp.pad(x, [(0, 0), *((n // 2, n - n // 2) for n in lacking), (0, 0)])
    parts = (
        x[:, i : i + ends[0] : stride, j : j + ends[1] : stride] * kernel[i, j, 0]
        for i, j in np.ndindex(*kernel.shape[:2])
    )
    return functools.reduce(jnp.add, parts)


def normalise(
    x: Float[Array, "b h w c"], entry: Mapping[str, Float[Array, "c"]]
) -> Float[Array, "b h w c"]:
    """Batch normalisation with the running statistics (PyTorch's names)."""
    spread = jnp.sqrt(entry["running_var"] + BATCH_NORM_EPSILON)
    return (x - entry["running_mean"]) / spread * entry["weight"] + entry["bias"]


def max_pool(x: Float[Array, "b h w c"], *, stride: int, padding: str) -> Float[Array, "b p q c"]:
    """The largest of 3x3 pixels."""
    return jax.lax.reduce_window(
        x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, stride, stride, 1), padding
    )


def average_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """The mean of those of 3x3 pixels that lie in the picture (TensorFlow's, SAME)."""

    def total(values):
        return jax.lax.reduce_window(values, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")

    return total(x) / total(jnp.ones((1, *x.shape[1:3], 1), x.dtype))


def floats(pictures: Array | np.ndarray) -> Float[Array, "b h w 3"]:
    """uint8 [B, H, W, 3] as float32, unscaled.

    Raises:
        ValueError: another type or shape.
    """
    if pictures.ndim != 4 or pictures.shape[-1] != 3 or pictures.dtype != jnp.uint8:
        raise ValueError(
            f"pictures: {pictures.dtype} {list(pictures.shape)}, expected uint8 [B, H, W, 3]"
        )
    return jnp.asarray(pictures).astype(jnp.float32)
