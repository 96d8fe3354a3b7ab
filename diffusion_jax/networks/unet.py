"""U-Net of the DDPM, DDPM++ and ADM line: residual blocks, adaptive group norm, attention."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from diffusion_jax.errors import ConfigError
from diffusion_jax.networks.attention import ATTENTIONS, CrossAttention, SelfAttention
from diffusion_jax.networks.conv import Conv, Upsample
from diffusion_jax.networks.embeddings import ConditionEmbedding
from diffusion_jax.networks.layers import GroupNorm, Linear, constrain_batch, dropout, fold_key
from diffusion_jax.networks.text import Text, TextConditioning, TextConfig
from diffusion_jax.networks.validation import (
    check_choice,
    check_common,
    check_divides,
    check_even,
    check_example,
    check_positive,
    check_spatial,
)

NO_TEXT = Text(None, None, None)


class ResidualBlock(nnx.Module):
    """norm, SiLU, conv; norm scaled and shifted by the condition, SiLU, conv from zero; plus x."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        condition: int,
        *,
        rank: int,
        dropout: float,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.dropout = dropout
        self.norm1 = GroupNorm(channels, rngs=rngs)
        self.conv1 = Conv(channels, out_channels, rank=rank, dtype=dtype, rngs=rngs)
        self.ada = Linear(condition, 2 * out_channels, dtype=dtype, rngs=rngs)
        self.norm2 = GroupNorm(out_channels, rngs=rngs)
        self.conv2 = Conv(out_channels, out_channels, rank=rank, zero=True, dtype=dtype, rngs=rngs)
        self.skip = (
            None
            if channels == out_channels
            else Conv(channels, out_channels, rank=rank, size=1, dtype=dtype, rngs=rngs)
        )

    def __call__(
        self,
        x: Float[Array, "b *space c"],
        condition: Float[Array, "b e"],
        key: Key[Array, "*k"] | None,
    ) -> Float[Array, "b *space d"]:
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        scale, shift = jnp.split(self.ada(condition), 2, axis=-1)
        h = dropout(jax.nn.silu(self.norm2(h, scale, shift)), self.dropout, key)
        return (x if self.skip is None else self.skip(x)) + self.conv2(h)


class SpatialAttention(nnx.Module):
    """Group norm and self-attention over all positions, then the same to the tokens of a text.

    Output projections start from zero. `text_dim` is the width of the text's tokens, 0 without.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        *,
        text_dim: int,
        implementation: str,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        common: Any = {"implementation": implementation, "dtype": dtype, "rngs": rngs}
        self.norm = GroupNorm(channels, rngs=rngs)
        self.attention = SelfAttention(channels, heads, zero=True, **common)
        self.cross_norm = GroupNorm(channels, rngs=rngs) if text_dim else None
        self.cross = CrossAttention(channels, text_dim, heads, **common) if text_dim else None

    def __call__(self, x: Float[Array, "b *space c"], text: Text) -> Float[Array, "b *space c"]:
        def tokens(norm: GroupNorm) -> Float[Array, "b n c"]:
            return norm(x).reshape(x.shape[0], -1, x.shape[-1])

        x = x + self.attention(tokens(self.norm)).reshape(x.shape)
        if self.cross is None or self.cross_norm is None:
            return x
        return x + self.cross(tokens(self.cross_norm), text.tokens, text.mask).reshape(x.shape)


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
    ) -> Float[Array, "b *space d"]:
        x = self.residual(x, condition, key)
        return constrain_batch(x if self.attention is None else self.attention(x, text))


class UNet(nnx.Module):
    """U-Net over `(height, width, channels)`, or any other number of spatial axes.

    Args:
        shape: shape of an example, channels last: `(32, 32, 3)`, audio `(length, channels)`.
        channels: width of the first level.
        multipliers: width of each level over `channels`; each level but the first halves the map.
        blocks: residual blocks a level on the way down (one more on the way up).
        attention_resolutions: longer sides of the feature maps at which blocks have attention;
            None: 16 where a level has that size (DDPM 2020).
        middle_attention: attention between the two blocks at the lowest resolution.
        heads: attention heads; give `head_dim` instead for heads of a fixed size.
        attention: implementation, `auto`, `xla` or `cudnn`.
        dropout: rate inside the residual blocks; active when a key is given.
        num_classes: 0 for an unconditional network.
        scalars: conditioning numbers, `scalar` `[b, scalars]`.
        text: encoder of captions, read by cross-attention at the levels with attention and, pooled,
            with the noise level.
        out_channels: channels of the output; None: those of the input.
        noise_input: unit of the noise argument (`logsnr`, `t`, `c_noise`, `timestep`).
        dtype: compute dtype; parameters and output are float32.

    Raises:
        ConfigError: a size that cannot work, naming `network.unet.<field>`.

    Sources: Ho et al. 2020 (DDPM), Song et al. 2021 (DDPM++), Dhariwal & Nichol 2021 (ADM).
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        channels: int = 64,
        multipliers: Sequence[int] = (1, 2, 2),
        blocks: int = 2,
        attention_resolutions: Sequence[int] | None = None,
        middle_attention: bool = True,
        heads: int = 4,
        head_dim: int | None = None,
        attention: str = "auto",
        dropout: float = 0.0,
        num_classes: int = 0,
        scalars: int = 0,
        text: TextConfig | None = None,
        out_channels: int | None = None,
        noise_input: str = "logsnr",
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_spatial("network.unet", shape)
        out_channels = shape[-1] if out_channels is None else out_channels
        check_positive("network.unet", channels=channels, blocks=blocks, out_channels=out_channels)
        check_even("network.unet.channels", channels)
        check_choice("network.unet.attention", attention, ATTENTIONS)
        dtype = check_common(
            "network.unet", num_classes, dropout, noise_input, dtype, scalars=scalars
        )
        self.shape, self.noise_input, self.dtype = tuple(shape), noise_input, dtype
        sizes = level_sizes(self.shape[:-1], multipliers)
        attended = attended_levels(sizes, attention_resolutions)
        widths = [channels * multiplier for multiplier in multipliers]
        rank, condition = len(self.shape) - 1, 4 * channels
        text_dim = (text.features or text.dim) if text else 0
        common: Any = {"rank": rank, "dtype": dtype, "rngs": rngs}

        def build(part: Part) -> Any:
            width = widths[part.level]
            if part.kind == "downsample":
                return Conv(part.source, width, stride=2, **common)
            if part.kind == "upsample":
                return Upsample(width, **common)
            residual = ResidualBlock(part.source, width, condition, dropout=dropout, **common)
            if part.kind == "residual":
                return Stage(residual, None)
            count = head_count(width, heads, head_dim)
            spatial = SpatialAttention(
                width,
                count,
                text_dim=text_dim,
                implementation=attention,
                dtype=dtype,
                rngs=rngs,
            )
            return Stage(residual, spatial)

        self.condition = ConditionEmbedding(
            noise_input,
            channels,
            condition,
            num_classes,
            scalars=scalars,
            stddev=1.0,
            dtype=dtype,
            rngs=rngs,
        )
        self.text = (
            TextConditioning(
                text,
                dim=text_dim,
                pooled_dim=condition,
                stddev=1.0,
                attention=attention,
                dtype=dtype,
                rngs=rngs,
            )
            if text
            else None
        )
        self.stem = Conv(self.shape[-1], channels, **common)
        down, middle, up = layer_plan(channels, widths, blocks, attended, middle_attention)
        self.down = nnx.Dict({part.name: build(part) for part in down})
        self.middle = nnx.Dict({part.name: build(part) for part in middle})
        self.up = nnx.Dict({part.name: build(part) for part in up})
        # Merged dicts come back sorted by name: the order of execution is kept apart.
        self.down_order, self.up_order = (tuple(p.name for p in parts) for parts in (down, up))
        self.norm = GroupNorm(channels * multipliers[0], rngs=rngs)
        self.head = Conv(channels * multipliers[0], out_channels, zero=True, **common)

    def __call__(
        self,
        x: Float[Array, "b *space c"],
        noise: Float[Array, " b"],
        conditioning: Mapping[str, Array],
        *,
        key: Key[Array, "*k"] | None = None,
    ) -> Float[Array, "b *space d"]:
        check_example(x, self.shape)
        text = NO_TEXT if self.text is None else self.text(conditioning, x.shape[0])
        condition = jax.nn.silu(self.condition(noise, conditioning, text.pooled))
        h = self.stem(x)
        skips, part = [h], 0
        for name in self.down_order:
            layer: Any = self.down[name]
            h = (
                layer(h, condition, text, fold_key(key, part))
                if isinstance(layer, Stage)
                else layer(h)
            )
            skips.append(h)
            part += 1
        for layer in self.middle.values():
            h = layer(h, condition, text, fold_key(key, part))
            part += 1
        for name in self.up_order:
            layer: Any = self.up[name]
            if isinstance(layer, Stage):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = layer(h, condition, text, fold_key(key, part))
            else:
                h = layer(h)
            part += 1
        return self.head(jax.nn.silu(self.norm(h))).astype(jnp.float32)


class Part(NamedTuple):
    """What stands at one place: its name, kind, level and the channels that reach it."""

    name: str
    kind: str
    level: int
    source: int


def layer_plan(
    channels: int,
    widths: Sequence[int],
    blocks: int,
    attended: Collection[int],
    middle_attention: bool,
) -> tuple[list[Part], list[Part], list[Part]]:
    """Parts of the way down, the middle and the way up, in the order in which they run.

    Kinds: `residual`, `attention` (a residual block, then attention), `downsample`, `upsample`.
    """
    down, up, skips, width = [], [], [channels], channels
    last = len(widths) - 1
    kinds = ["attention" if level in attended else "residual" for level in range(len(widths))]
    for level in range(len(widths)):
        for i in range(blocks):
            down.append(Part(f"level{level}_{i}", kinds[level], level, width))
            width = widths[level]
            skips.append(width)
        if level < last:
            down.append(Part(f"level{level}_downsample", "downsample", level, width))
            skips.append(width)
    kind = "attention" if middle_attention else "residual"
    middle = [Part("0", kind, last, width), Part("1", "residual", last, width)]
    for level in reversed(range(len(widths))):
        for i in range(blocks + 1):
            up.append(Part(f"level{level}_{i}", kinds[level], level, width + skips.pop()))
            width = widths[level]
        if level:
            up.append(Part(f"level{level}_upsample", "upsample", level, width))
    return down, middle, up


def level_sizes(space: Sequence[int], multipliers: Sequence[int]) -> list[tuple[int, ...]]:
    """Spatial size of each level; ConfigError when the map cannot be halved that often."""
    field = "network.unet.multipliers"
    if not multipliers or min(multipliers) < 1:
        raise ConfigError(f"{field}={tuple(multipliers)}: expected one or more positive integers")
    halvings = len(multipliers) - 1
    possible = min((size & -size).bit_length() - 1 for size in space)
    if halvings > possible:
        shown = "x".join(map(str, space))
        raise ConfigError(
            f"{field}={tuple(multipliers)}: {shown} cannot be halved {halvings} times; "
            f"give at most {possible + 1} multipliers, or pad the data to a multiple of "
            f"{2**halvings}"
        )
    return [tuple(size >> level for size in space) for level in range(halvings + 1)]


def attended_levels(
    sizes: Sequence[tuple[int, ...]], resolutions: Sequence[int] | None
) -> frozenset[int]:
    """Levels whose longer side is among `resolutions`; ConfigError for one no level has."""
    sides = [max(size) for size in sizes]
    if resolutions is None:
        resolutions = [side for side in sides if side == 16]
    for resolution in resolutions:
        if resolution not in sides:
            near = min(sides, key=lambda side: abs(side - resolution))
            raise ConfigError(
                f"network.unet.attention_resolutions={tuple(resolutions)}: no level has a side of "
                f"{resolution}; levels: {', '.join(map(str, sides))}; nearest: {near}"
            )
    return frozenset(level for level, side in enumerate(sides) if side in resolutions)


def head_count(width: int, heads: int, head_dim: int | None) -> int:
    """Number of attention heads of a level; ConfigError unless they divide its width."""
    if head_dim is None:
        check_divides("network.unet.heads", heads, width, "the width of an attention level")
        return heads
    check_divides("network.unet.head_dim", head_dim, width, "the width of an attention level")
    return width // head_dim
