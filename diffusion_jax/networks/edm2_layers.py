"""Layers that keep the magnitude of what passes through them (Karras et al. 2024, EDM2).

Every layer maps activations of unit variance to activations of unit variance, as an expectation
over random weights; equation numbers are those of arXiv:2312.02696. There are no biases.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from diffusion_jax.networks.attention import attend
from diffusion_jax.networks.conv import convolve
from diffusion_jax.networks.embeddings import (
    SCALAR_FEATURES,
    as_c_noise,
    fourier_waves,
    sinusoidal,
)
from diffusion_jax.networks.layers import matmul

EPSILON = 1e-4
"""Added to magnitudes that are divided by."""

SILU_MAGNITUDE = 0.596
"""Root mean square of SiLU over a standard normal variable."""


def unit_magnitude(x: Array, axes: int | tuple[int, ...]) -> Array:
    """`x` over its root mean square along `axes`, in float32 (eq. 47)."""
    wide = x.astype(jnp.float32)
    size = jnp.sqrt(jnp.mean(jnp.square(wide), axes, keepdims=True) + EPSILON**2)
    return wide / size


def pixel_norm(x: Float[Array, "b *space c"]) -> Float[Array, "b *space c"]:
    """Scales the channels at each place to unit magnitude, without a learned gain."""
    return unit_magnitude(x, -1).astype(x.dtype)


def mp_silu(x: Array) -> Array:
    """SiLU over its magnitude for standard normal input (eq. 81)."""
    return jax.nn.silu(x) / SILU_MAGNITUDE


def mp_sum(a: Array, b: Array, balance: float) -> Array:
    """`(1 - balance) a + balance b`, of unit variance where both are and do not correlate (eq. 88).

    Args:
        balance: weight of `b`, in [0, 1].
    """
    size = math.hypot(1 - balance, balance)
    return a * ((1 - balance) / size) + b * (balance / size)


def mp_cat(
    a: Float[Array, "b *space c"], b: Float[Array, "b *space d"], balance: float
) -> Float[Array, "b *space e"]:
    """Both along channels, `b` contributing `balance` and `a` the rest, at any widths (eq. 103)."""
    count_a, count_b = a.shape[-1], b.shape[-1]
    size = math.sqrt((count_a + count_b) / ((1 - balance) ** 2 + balance**2))
    scale_a = size / math.sqrt(count_a) * (1 - balance)
    scale_b = size / math.sqrt(count_b) * balance
    return jnp.concatenate([a * scale_a, b * scale_b], axis=-1)


class MPConv(nnx.Module):
    """Convolution (or, of size 0, linear layer) whose weights have unit magnitude (eq. 47).

    The kernel, `(*size, in, out)`, is normalised for each output in every forward pass, which keeps
    its gradient at right angles to it; `normalize_weights` is to bring the stored one back to unit
    magnitude after each update. The result is of unit variance where the input is.

    Args:
        rank: number of spatial axes.
        size: side of the kernel along each of them, odd; 0: a matrix, over the last axis alone.
        dtype: compute dtype.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        *,
        rank: int = 0,
        size: int = 0,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        shape = (*(size,) * rank, channels, out_channels) if size else (channels, out_channels)
        normal = nnx.initializers.normal(1.0)
        self.kernel = nnx.Param(normal(rngs.params(), shape, jnp.float32))

    def __call__(
        self, x: Float[Array, "b *space c"], gain: Float[Array, ""] | float = 1.0
    ) -> Float[Array, "b *space d"]:
        """The convolution times `gain`."""
        kernel = unit_weights(self.kernel[...])
        kernel = kernel * (gain / math.sqrt(math.prod(kernel.shape[:-1])))
        kernel, x = kernel.astype(self.dtype), x.astype(self.dtype)
        return matmul(x, kernel) if kernel.ndim == 2 else convolve(x, kernel)


def unit_weights(kernel: Float[Array, "*fan_in d"]) -> Float[Array, "*fan_in d"]:
    """A kernel whose weights of each output have a root mean square of one."""
    return unit_magnitude(kernel, tuple(range(kernel.ndim - 1)))


def mp_fourier(noise: Float[Array, " b"], features: int, noise_input: str) -> Array:
    """Fourier features of unit variance, [b, features] (eq. 75), float32.

    Units of noise other than EDM's `c_noise` = ln(sigma) / 4 are brought to its range.
    """
    frequencies, phases = fourier_waves(features)
    level = as_c_noise(noise, noise_input)
    return math.sqrt(2) * jnp.cos(level[:, None] * frequencies + phases)


class MPLabel(nnx.Module):
    """MP linear layer of a scaled one-hot label, with one more class for "no class" (appendix B).

    A row of the table, its columns of unit magnitude, is just that product.
    """

    def __init__(self, num_classes: int, dim: int, *, rngs: nnx.Rngs):
        self.num_classes = num_classes
        normal = nnx.initializers.normal(1.0)
        self.table = nnx.Param(normal(rngs.params(), (num_classes + 1, dim), jnp.float32))

    def __call__(
        self, label: Int[Array, " b"] | None, keep: Bool[Array, " b"] | None, batch: int
    ) -> Float[Array, "b d"]:
        """The label's vector where it is kept, else that of "no class", as without any label.

        A label out of range gives NaN where it is kept, never another class's vector.
        """
        table, null = unit_weights(self.table[...]), self.num_classes
        if label is None:
            return jnp.broadcast_to(table[null], (batch, table.shape[1]))
        # "No class" is no label that data may give.
        row = jnp.where((label < 0) | (label >= null), null + 1, label)
        if keep is not None:
            row = jnp.where(keep, row, null)
        return table.at[row].get(mode="fill", fill_value=jnp.nan)


class MPScalars(nnx.Module):
    """MP linear layer of sinusoids of an example's numbers; one more input stands for "none"."""

    def __init__(self, scalars: int, dim: int, *, dtype: Any, rngs: nnx.Rngs):
        self.scalars = scalars
        self.linear = MPConv(scalars * SCALAR_FEATURES + 1, dim, dtype=dtype, rngs=rngs)

    def __call__(
        self, scalar: Float[Array, "b k"] | None, keep: Bool[Array, " b"] | None, batch: int
    ) -> Float[Array, "b d"]:
        """The numbers' vector where it is kept, else that of "none", as without any numbers.

        Raises:
            ValueError: there are more or fewer numbers than the network was built for.
        """
        inputs = self.scalars * SCALAR_FEATURES + 1
        none = jnp.zeros((batch, inputs)).at[:, -1].set(math.sqrt(inputs))
        if scalar is None:
            return self.linear(none)
        if scalar.shape[1] != self.scalars:
            raise ValueError(f"scalar has shape {scalar.shape}; expected ({batch}, {self.scalars})")
        angles = 100.0 * scalar.astype(jnp.float32)
        waves = sinusoidal(angles.reshape(-1), SCALAR_FEATURES, max_period=1e6)
        features = jnp.pad(math.sqrt(2) * waves.reshape(batch, -1), ((0, 0), (0, 1)))
        return self.linear(features if keep is None else jnp.where(keep[:, None], features, none))


class MPAttention(nnx.Module):
    """Cosine self-attention over all positions; its result is to be summed by `mp_sum`.

    Queries, keys and values of each head are scaled to unit magnitude. The fused projection is laid
    out (heads, 3, head size), so that splitting its last axis over devices splits whole heads.
    """

    def __init__(self, dim: int, heads: int, *, implementation: str, dtype: Any, rngs: nnx.Rngs):
        self.heads, self.implementation = heads, implementation
        self.qkv = MPConv(dim, 3 * dim, dtype=dtype, rngs=rngs)
        self.out = MPConv(dim, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b *space c"]) -> Float[Array, "b *space c"]:
        b, *_, c = x.shape
        fused = self.qkv(x.reshape(b, -1, c)).reshape(b, -1, self.heads, 3, c // self.heads)
        q, k, v = jnp.moveaxis(pixel_norm(fused), 3, 0)
        y = v if self.implementation == "identity" else attend(q, k, v, self.implementation)
        return self.out(y.reshape(b, -1, c)).reshape(x.shape)


class MPCrossAttention(nnx.Module):
    """Cosine attention of all positions to the tokens of a text, laid out as `MPAttention`.

    EDM2 reads no text; this follows its rules. Tokens are scaled to unit magnitude first.
    """

    def __init__(
        self,
        dim: int,
        text_dim: int,
        heads: int,
        *,
        implementation: str,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.heads, self.implementation = heads, implementation
        self.q = MPConv(dim, dim, dtype=dtype, rngs=rngs)
        self.kv = MPConv(text_dim, 2 * dim, dtype=dtype, rngs=rngs)
        self.out = MPConv(dim, dim, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b *space c"],
        tokens: Float[Array, "b m e"],
        mask: Bool[Array, "b m"] | None,
    ) -> Float[Array, "b *space c"]:
        b, *_, c = x.shape
        q = pixel_norm(self.q(x.reshape(b, -1, c)).reshape(b, -1, self.heads, c // self.heads))
        fused = self.kv(pixel_norm(tokens)).reshape(b, -1, self.heads, 2, c // self.heads)
        k, v = jnp.moveaxis(pixel_norm(fused), 3, 0)
        y = attend(q, k, v, self.implementation, mask=mask).reshape(b, -1, c)
        return self.out(y).reshape(x.shape)
