"""What a U-Net is made of: residual blocks that may resample, attention, changes of resolution."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from diffusion_jax.networks.attention import CrossAttention, SelfAttention
from diffusion_jax.networks.conv import Conv, Upsample, of_doubled, strided
from diffusion_jax.networks.layers import GroupNorm, Linear, constrain_batch, dropout
from diffusion_jax.networks.resampling import blur_all, enlarge, halve
from diffusion_jax.networks.text import Text


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageOptions:
    """What all parts of a U-Net have in common.

    Attributes:
        rank: number of spatial axes.
        condition: width of the embedding of noise and conditions.
        text_dim: width of the text's tokens, 0 without.
        dropout: rate inside the residual blocks; active when a key is given.
        scale_shift: whether the condition scales and shifts the second norm's result, or is added
            before that norm.
        resampling: filter of changes of resolution, `box` or `fir`.
        resample_projection: whether blocks that change the resolution have a convolution of size 1
            beside their branch.
        rescale_skips: divide sums of a branch and its input by sqrt(2).
        norm_groups: groups of the group norms at most.
        norm_epsilon: added to variances in them.
        attention: implementation, see `attend`.
        dtype: compute dtype.
    """

    rank: int
    condition: int
    text_dim: int = 0
    dropout: float = 0.0
    scale_shift: bool = True
    resampling: str = "box"
    resample_projection: bool = False
    rescale_skips: bool = False
    norm_groups: int = 32
    norm_epsilon: float = 1e-5
    attention: str = "auto"
    dtype: Any = jnp.float32

    def norm(self, channels: int, rngs: nnx.Rngs) -> GroupNorm:
        """A group norm."""
        sizes: Any = {"groups": self.norm_groups, "epsilon": self.norm_epsilon}
        return GroupNorm(channels, **sizes, rngs=rngs)

    def conv(
        self, channels: int, out_channels: int, rngs: nnx.Rngs, *, size: int = 3, zero: bool = False
    ) -> Conv:
        """A convolution."""
        kind: Any = {"rank": self.rank, "size": size, "zero": zero, "dtype": self.dtype}
        return Conv(channels, out_channels, **kind, rngs=rngs)

    def join(self, x: Array, branch: Array) -> Array:
        """The sum that ends a residual branch."""
        return (x + branch) * math.sqrt(0.5) if self.rescale_skips else x + branch


class ResidualBlock(nnx.Module):
    """norm, SiLU, conv; norm scaled and shifted by the condition, SiLU, conv from zero; plus x.

    Args:
        resample: `down` or `up` to change the resolution before the first convolution and beside
            the branch (BigGAN, ADM); nothing to keep it.
    """

    def __init__(
        self,
        options: StageOptions,
        channels: int,
        out_channels: int,
        *,
        resample: str = "",
        rngs: nnx.Rngs,
    ):
        self.options, self.resample = options, resample
        self.norm1 = options.norm(channels, rngs)
        self.conv1 = options.conv(channels, out_channels, rngs)
        outputs = 2 * out_channels if options.scale_shift else out_channels
        self.ada = Linear(options.condition, outputs, dtype=options.dtype, rngs=rngs)
        self.norm2 = options.norm(out_channels, rngs)
        self.conv2 = options.conv(out_channels, out_channels, rngs, zero=True)
        projected = channels != out_channels or (resample and options.resample_projection)
        self.skip = options.conv(channels, out_channels, rngs, size=1) if projected else None

    def __call__(
        self,
        x: Float[Array, "b *space c"],
        condition: Float[Array, "b e"],
        key: Key[Array, "*k"] | None,
    ) -> Float[Array, "b *out d"]:
        kind = self.options.resampling
        h = jax.nn.silu(self.norm1(x))
        if self.resample == "down":
            h, x = self.conv1(halve(h, kind)), halve(x, kind)
        elif self.resample == "up":
            h = of_doubled(self.conv1, h) if kind == "box" else self.conv1(enlarge(h, kind))
            x = enlarge(x, kind)
        else:
            h = self.conv1(h)
        modulation = self.ada(condition)
        if self.options.scale_shift:
            scale, shift = jnp.split(modulation, 2, axis=-1)
            h = self.norm2(h, scale, shift)
        else:
            h = self.norm2(h + jnp.expand_dims(modulation, tuple(range(1, h.ndim - 1))))
        h = self.conv2(dropout(jax.nn.silu(h), self.options.dropout, key))
        return self.options.join(x if self.skip is None else self.skip(x), h)


class SpatialAttention(nnx.Module):
    """Group norm and self-attention over all positions, then the same to the tokens of a text.

    Output projections start from zero.
    """

    def __init__(self, options: StageOptions, channels: int, heads: int, *, rngs: nnx.Rngs):
        common: Any = {
            "implementation": options.attention,
            "dtype": options.dtype,
            "rngs": rngs,
        }
        self.options = options
        self.norm = options.norm(channels, rngs)
        self.attention = SelfAttention(channels, heads, zero=True, **common)
        text_dim = options.text_dim
        self.cross_norm = options.norm(channels, rngs) if text_dim else None
        self.cross = CrossAttention(channels, text_dim, heads, **common) if text_dim else None

    def __call__(self, x: Float[Array, "b *space c"], text: Text) -> Float[Array, "b *space c"]:
        def tokens(norm: GroupNorm) -> Float[Array, "b n c"]:
            return norm(x).reshape(x.shape[0], -1, x.shape[-1])

        x = self.options.join(x, self.attention(tokens(self.norm)).reshape(x.shape))
        if self.cross is None or self.cross_norm is None:
            return x
        h = self.cross(tokens(self.cross_norm), text.tokens, text.mask)
        return self.options.join(x, h.reshape(x.shape))


class Stage(nnx.Module):
    """A residual block and, at the chosen resolutions, attention after it."""

    def __init__(self, residual: ResidualBlock, attention: SpatialAttention | None):
        self.residual, self.attention = residual, attention

    def __call__(
        self,
        x: Float[Array, "b *space c"],
        condition: Float[Array, "b e"],
        text: Text,
        key: Key[Array, "*k"] | None,
    ) -> Float[Array, "b *out d"]:
        x = self.residual(x, condition, key)
        return constrain_batch(x if self.attention is None else self.attention(x, text))


class Downsample(nnx.Module):
    """A blur along every spatial axis, then a convolution of size 3 and stride 2 (Song 2021)."""

    def __init__(self, options: StageOptions, channels: int, width: int, *, rngs: nnx.Rngs):
        self.kind = options.resampling
        self.conv = options.conv(channels, width, rngs)

    def __call__(self, x: Float[Array, "b *space c"]) -> Float[Array, "b *out d"]:
        return strided(self.conv, blur_all(x, self.kind))


class FilteredUpsample(nnx.Module):
    """Doubles every spatial axis by the filter, then a convolution of size 3."""

    def __init__(self, options: StageOptions, channels: int, *, rngs: nnx.Rngs):
        self.kind = options.resampling
        self.conv = options.conv(channels, channels, rngs)

    def __call__(self, x: Float[Array, "b *space c"]) -> Float[Array, "b *out d"]:
        return self.conv(enlarge(x, self.kind))


def make_resampler(
    options: StageOptions, kind: str, channels: int, width: int, rngs: nnx.Rngs
) -> nnx.Module:
    """A convolution that ends in half (`downsample`) or from double the size (`upsample`).

    With the `box` filter these are a strided convolution and one after repeated entries.
    """
    common: Any = {"rank": options.rank, "dtype": options.dtype, "rngs": rngs}
    if kind == "downsample":
        if options.resampling == "box":
            return Conv(channels, width, stride=2, **common)
        return Downsample(options, channels, width, rngs=rngs)
    if options.resampling == "box":
        return Upsample(channels, **common)
    return FilteredUpsample(options, channels, rngs=rngs)
