"""Convolution of any spatial rank, channels last, padded to keep the size."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from diffusion_jax.networks.layers import ZEROS, matmul

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
        return matmul(x, kernel.reshape(kernel.shape[rank:]))
    padding = [(size // 2, size // 2) for size in kernel.shape[:rank]]
    return _convolve(x, kernel, stride, padding)


def _convolve(x: Array, kernel: Array, stride: int, padding: Sequence[tuple[int, int]]) -> Array:
    rank = x.ndim - 2
    space = _SPACE[-rank:]
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride,) * rank,
        padding=padding,
        dimension_numbers=(f"N{space}C", f"{space}IO", f"N{space}C"),
    )


def strided(conv: Conv, x: Float[Array, "b *space c"]) -> Float[Array, "b *out d"]:
    """The convolution at every other place, without padding."""
    kernel = conv.kernel[...].astype(conv.dtype)
    padding = [(0, 0)] * (x.ndim - 2)
    out = _convolve(x.astype(conv.dtype), kernel, 2, padding)
    return out + conv.bias[...].astype(conv.dtype)


class Upsample(nnx.Module):
    """Nearest-neighbour doubling of every spatial axis, then a convolution of size 3."""

    def __init__(self, channels: int, *, rank: int, dtype: Any, rngs: nnx.Rngs):
        self.conv = Conv(channels, channels, rank=rank, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b *space c"]) -> Float[Array, "b *out c"]:
        return of_doubled(self.conv, x)


def of_doubled(conv: Conv, x: Float[Array, "b *space c"]) -> Float[Array, "b *out d"]:
    """`conv(double(x))`, for a convolution of size 3."""
    # On CPU the phases are about twice as fast; elsewhere one large convolution is preferred to
    # 2^rank small ones. Both have the same parameters and result.
    if jax.default_backend() != "cpu":
        return conv(double(x))
    doubled = convolve_doubled(x.astype(conv.dtype), conv.kernel[...].astype(conv.dtype))
    return doubled + conv.bias[...].astype(conv.dtype)


def double(x: Float[Array, "b *space c"]) -> Float[Array, "b *out c"]:
    """Repeats every entry twice along every spatial axis."""
    b, *space, c = x.shape
    split = x.reshape(b, *(n for size in space for n in (size, 1)), c)
    wide = jnp.broadcast_to(split, (b, *(n for size in space for n in (size, 2)), c))
    return wide.reshape(b, *(2 * size for size in space), c)


def convolve_doubled(
    x: Float[Array, "b *space c"], kernel: Float[Array, "*size c d"]
) -> Float[Array, "b *out d"]:
    """`convolve(double(x), kernel)` for kernels of size 3, with (2/3)^rank of the operations.

    Three taps on a doubled axis meet two entries only: at even positions (i - 1, i, i), at odd
    ones (i, i, i + 1). So each of the 2^rank phases of the result is a convolution of size 2.
    """
    b, *space, _ = x.shape
    rank = len(space)
    outputs = []
    for phase in itertools.product((0, 1), repeat=rank):
        taps = kernel
        for axis, odd in enumerate(phase):
            first, second, third = (
                jax.lax.index_in_dim(taps, i, axis, keepdims=True) for i in range(3)
            )
            pair = (first + second, third) if odd else (first, second + third)
            taps = jnp.concatenate(pair, axis)
        outputs.append(_convolve(x, taps, 1, [(1 - odd, odd) for odd in phase]))
    split = jnp.stack(outputs).reshape(*(2,) * rank, b, *space, -1)
    order = [rank, *(n for i in range(rank) for n in (rank + 1 + i, i)), 2 * rank + 1]
    return split.transpose(order).reshape(b, *(2 * size for size in space), -1)
