"""Convolution of any spatial rank, channels last, padded to keep the size."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from diffusion_jax.networks.layers import ZEROS

_SPACE = "DHW"


class Conv(nnx.Module):
    """Convolution with padding `size // 2`; with stride 2 it halves even maps.

    Args:
        rank: number of spatial axes.
        size: kernel size along each of them, odd.
        zero: start from zero instead of variance-preserving random weights.
        dtype: compute dtype.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        *,
        rank: int,
        size: int = 3,
        stride: int = 1,
        zero: bool = False,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.stride, self.dtype = stride, dtype
        make = ZEROS if zero else nnx.initializers.lecun_normal()
        shape = (*(size,) * rank, channels, out_channels)
        self.kernel = nnx.Param(make(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(jnp.zeros((out_channels,), jnp.float32))

    def __call__(self, x: Float[Array, "b *space c"]) -> Float[Array, "b *out d"]:
        kernel = self.kernel[...].astype(self.dtype)
        return convolve(x.astype(self.dtype), kernel, self.stride) + self.bias[...].astype(
            self.dtype
        )


def convolve(
    x: Float[Array, "b *space c"], kernel: Float[Array, "*size c d"], stride: int = 1
) -> Float[Array, "b *out d"]:
    """Cross-correlation, channels last, padded by half the (odd) kernel size with zeros."""
    rank = x.ndim - 2
    if math.prod(kernel.shape[:rank]) == 1 and stride == 1:
        return x @ kernel.reshape(kernel.shape[rank:])
    space = _SPACE[-rank:]
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride,) * rank,
        padding=[(size // 2, size // 2) for size in kernel.shape[:rank]],
        dimension_numbers=(f"N{space}C", f"{space}IO", f"N{space}C"),
    )


class Upsample(nnx.Module):
    """Nearest-neighbour doubling of every spatial axis, then a convolution of size 3."""

    def __init__(self, channels: int, *, rank: int, dtype: Any, rngs: nnx.Rngs):
        self.conv = Conv(channels, channels, rank=rank, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b *space c"]) -> Float[Array, "b *out c"]:
        return self.conv(double(x))


def double(x: Float[Array, "b *space c"]) -> Float[Array, "b *out c"]:
    """Repeats every entry twice along every spatial axis."""
    b, *space, c = x.shape
    split = x.reshape(b, *(n for size in space for n in (size, 1)), c)
    wide = jnp.broadcast_to(split, (b, *(n for size in space for n in (size, 2)), c))
    return wide.reshape(b, *(2 * size for size in space), c)
