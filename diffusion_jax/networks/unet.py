"""U-Net of the DDPM, DDPM++, NCSN++ and ADM line: residual blocks, group norm, attention."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from diffusion_jax.networks.attention import ATTENTIONS, check_attention
from diffusion_jax.networks.blocks import REMAT, make_blocks, run_blocks
from diffusion_jax.networks.embeddings import NOISE_EMBEDDINGS, ConditionEmbedding
from diffusion_jax.networks.layers import fold_key
from diffusion_jax.networks.resampling import FILTERS
from diffusion_jax.networks.text import Text, TextConditioning, TextConfig
from diffusion_jax.networks.unet_blocks import (
    ResidualBlock,
    SpatialAttention,
    Stage,
    StageOptions,
    make_resampler,
)
from diffusion_jax.networks.unet_plan import (
    Part,
    Plan,
    attended_levels,
    head_count,
    layer_plan,
    level_blocks,
    level_sizes,
    merged,
)
from diffusion_jax.networks.validation import (
    check_choice,
    check_common,
    check_even,
    check_example,
    check_positive,
    check_spatial,
)

NO_TEXT = Text(None, None, None)
KINDS: Mapping[str, Collection[str]] = {
    "attention": ATTENTIONS,
    "encoder": ("standard", "residual"),
    "noise_embedding": NOISE_EMBEDDINGS,
    "remat": REMAT,
    "resample": ("conv", "block"),
    "resampling": FILTERS,
    "up_attention": ("all", "last"),
}
SECTION = "network.unet"


class UNet(nnx.Module):
    """U-Net over `(height, width, channels)`, or any other number of spatial axes.

    Args:
        shape: shape of an example, channels last: `(32, 32, 3)`, audio `(length, channels)`.
        channels: width of the first level.
        multipliers: width of each level over `channels`; each level but the first halves the map.
        blocks: residual blocks a level on the way down (one more on the way up): one number, or one
            a level.
        attention_resolutions: longer sides of the feature maps at which blocks have attention;
            None: 16 where a level has that size (DDPM 2020).
        middle_attention: attention between the two blocks at the lowest resolution.
        up_attention: on the way up after `all` blocks of such a level, or the `last` (DDPM++).
        heads: attention heads where `head_dim` is None or 0; else heads have that size.
        attention: implementation, `auto`, `xla`, `cudnn` or `identity`.
        dropout: rate inside the residual blocks; active when a key is given.
        scale_shift: the condition scales and shifts the second norm's result (ADM), or is added
            before that norm (DDPM).
        resample: halve and double by a convolution of its own (`conv`, DDPM), or inside a residual
            block (`block`; BigGAN, ADM, DDPM++).
        resample_projection: such blocks have a convolution of size 1 beside their branch (DDPM++).
        resampling: filter of these changes, `box` (means and repeated entries; none for `conv`) or
            `fir` (taps 1, 3, 3, 1; NCSN++).
        rescale_skips: sums of a branch and its input are divided by sqrt(2) (DDPM++).
        encoder: `residual` adds the input, brought to each level by strided convolutions, on the
            way down (NCSN++); `standard` does not.
        noise_embedding: sinusoids, `positional` (DDPM) or `fourier`, of normally spread frequencies
            (NCSN++).
        noise_features: their number; None: `channels`.
        norm_groups: groups of the group norms at most.
        norm_epsilon: added to variances in them.
        num_classes: 0 for an unconditional network.
        scalars: conditioning numbers, `scalar` `[b, scalars]`.
        text: encoder of captions, read by cross-attention at the levels with attention and, pooled,
            with the noise level.
        out_channels: channels of the output; None: those of the input.
        scan: blocks of one shape that follow each other are stacked (`up/level1_1/blocks/...`) and
            run as one `lax.scan`, which compiles faster; else `up/level1_1/...` and so on.
        remat: what the backward pass recomputes of each block: `none`, `dots` (all but results of
            linear layers and convolutions) or `full`.
        noise_input: unit of the noise argument (`logsnr`, `t`, `c_noise`, `timestep`).
        dtype: compute dtype; parameters and output are float32.

    Raises:
        ConfigError: a size that cannot work, naming `network.unet.<field>`.

    Sources: Ho et al. 2020 (DDPM), Song et al. 2021 (DDPM++ and NCSN++, in the layout of Karras et
    al. 2022, EDM), Dhariwal & Nichol 2021 (ADM). Their sizes: `presets_unet.py`.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        channels: int = 64,
        multipliers: Sequence[int] = (1, 2, 2),
        blocks: int | Sequence[int] = 2,
        attention_resolutions: Sequence[int] | None = None,
        middle_attention: bool = True,
        up_attention: str = "all",
        heads: int = 4,
        head_dim: int | None = None,
        attention: str = "auto",
        dropout: float = 0.0,
        scale_shift: bool = True,
        resample: str = "conv",
        resample_projection: bool = False,
        resampling: str = "box",
        rescale_skips: bool = False,
        encoder: str = "standard",
        noise_embedding: str = "positional",
        noise_features: int | None = None,
        norm_groups: int = 32,
        norm_epsilon: float = 1e-5,
        num_classes: int = 0,
        scalars: int = 0,
        text: TextConfig | None = None,
        out_channels: int | None = None,
        scan: bool = False,
        remat: str = "none",
        noise_input: str = "logsnr",
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_spatial(SECTION, shape)
        out_channels = out_channels if out_channels is not None else shape[-1]
        features = channels if noise_features is None else noise_features
        _check_even_sizes(channels=channels, noise_features=features)
        check_positive(SECTION, norm_groups=norm_groups, out_channels=out_channels)
        _check_kinds(resample=resample, resampling=resampling, encoder=encoder, remat=remat)
        _check_kinds(attention=attention, up_attention=up_attention)
        dtype = check_common(SECTION, num_classes, dropout, noise_input, dtype, scalars=scalars)
        self.shape, self.noise_input, self.dtype = tuple(shape), noise_input, dtype
        self.scan, self.remat, self.rescale_skips = scan, remat, rescale_skips
        widths = [channels * multiplier for multiplier in multipliers]
        attended = (attention_resolutions, middle_attention, up_attention)
        self.plan = self._make_plan(multipliers, widths, blocks, *attended)
        sums: Any = {"scale_shift": scale_shift, "rescale_skips": rescale_skips}
        filters: Any = {"resampling": resampling, "resample_projection": resample_projection}
        norms: Any = {"norm_groups": norm_groups, "norm_epsilon": norm_epsilon, "dropout": dropout}
        own = {**sums, **filters, **norms, "attention": attention, "dtype": dtype}
        options = _stage_options(len(self.shape) - 1, 4 * channels, text, own)
        self._build_condition(options, features, num_classes, scalars, text, noise_embedding, rngs)
        self.stem = options.conv(self.shape[-1], channels, rngs)
        count = functools.partial(_heads, options, heads, head_dim)
        self._build_parts(options, widths, resample, count, rngs)
        self.pyramid = _make_pyramid(options, self.shape[-1], self.plan, rngs, encoder)
        self.norm = options.norm(widths[0], rngs)
        self.head = options.conv(widths[0], out_channels, rngs, zero=True)

    def _make_plan(
        self,
        multipliers: Sequence[int],
        widths: Sequence[int],
        blocks: int | Sequence[int],
        attention_resolutions: Sequence[int] | None,
        middle_attention: bool,
        up_attention: str,
    ) -> Plan:
        levels = level_sizes(SECTION, self.shape[:-1], multipliers)
        attended = attended_levels(SECTION, levels, attention_resolutions)
        each = level_blocks(SECTION, blocks, len(widths))
        where: Any = {"middle_attention": middle_attention, "up_attention": up_attention}
        plan = layer_plan(widths[0] // multipliers[0], widths, each, attended, **where)
        if not self.scan:
            return plan
        return Plan(*(tuple(merged(parts, widths)) for parts in plan))

    def _build_condition(
        self,
        options: StageOptions,
        features: int,
        num_classes: int,
        scalars: int,
        text: TextConfig | None,
        kind: str,
        rngs: nnx.Rngs,
    ) -> None:
        """Embeddings of noise, class and numbers, and the reader of captions."""
        _check_kinds(noise_embedding=kind)
        self.condition = ConditionEmbedding(
            self.noise_input,
            features,
            options.condition,
            num_classes,
            scalars=scalars,
            stddev=1.0,
            kind=kind,
            dtype=options.dtype,
            rngs=rngs,
        )
        sizes: Any = {"dim": options.text_dim, "pooled_dim": options.condition, "stddev": 1.0}
        how: Any = {"attention": options.attention, "dtype": options.dtype}
        self.text = TextConditioning(text, **sizes, **how, rngs=rngs) if text else None

    def _build_parts(
        self, options: StageOptions, widths: Sequence[int], resample: str, heads: Any, rngs: Any
    ) -> None:
        """The way down, the middle and the way up."""

        def build(part: Part, rngs: nnx.Rngs) -> Any:
            width = widths[part.level]
            if part.kind in ("downsample", "upsample"):
                if resample == "conv":
                    return make_resampler(options, part.kind, part.source, width, rngs)
                change = part.kind.removesuffix("sample")
                block = ResidualBlock(options, part.source, width, resample=change, rngs=rngs)
                return Stage(block, None)
            residual = ResidualBlock(options, part.source, width, rngs=rngs)
            if part.kind == "residual":
                return Stage(residual, None)
            return Stage(residual, SpatialAttention(options, width, heads(width), rngs=rngs))

        def place(part: Part) -> Any:
            if part.depth == 1:
                return build(part, rngs)
            make = functools.partial(build, part)
            return nnx.Dict(
                {
                    "blocks": make_blocks(
                        lambda *, rngs: make(rngs=rngs), rngs, part.depth, scan=True
                    )
                }
            )

        self.down = nnx.Dict({part.name: place(part) for part in self.plan.down})
        self.middle = nnx.Dict({part.name: place(part) for part in self.plan.middle})
        self.up = nnx.Dict({part.name: place(part) for part in self.plan.up})

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
        run = functools.partial(self._run, condition=condition, text=text, key=key)
        h, pyramid = self.stem(x), x
        skips, number = [h], 0
        for part in self.plan.down:
            h, kept = run(self.down[part.name], part, h, number, keep=True)
            if self.pyramid is not None and part.kind == "downsample":
                layer: Any = self.pyramid[part.name]
                h = kept[0] = pyramid = self._joined(h, layer(pyramid))
            skips.extend(kept)
            number += part.depth
        for part in self.plan.middle:
            h, _ = run(self.middle[part.name], part, h, number)
            number += part.depth
        for part in self.plan.up:
            joined = [skips.pop() for _ in range(part.depth)] if part.skip else []
            h, _ = run(self.up[part.name], part, h, number, skips=joined)
            number += part.depth
        return self.head(jax.nn.silu(self.norm(h))).astype(jnp.float32)

    def _joined(self, h: Array, pyramid: Array) -> Array:
        total = h + pyramid
        return total * math.sqrt(0.5) if self.rescale_skips else total

    def _run(
        self,
        layer: Any,
        part: Part,
        h: Array,
        number: int,
        *,
        condition: Array,
        text: Text,
        key: Array | None,
        skips: Sequence[Array] = (),
        keep: bool = False,
    ) -> tuple[Array, list[Array]]:
        """What leaves the part and, with `keep`, each of its blocks; `number` is its first's."""

        def step(block: Any, h: Any, index: Any, skip: Any) -> tuple[Any, Any]:
            if not isinstance(block, Stage):
                h = block(h)
            else:
                h = h if skip is None else jnp.concatenate([h, skip], axis=-1)
                h = block(h, condition, text, fold_key(key, number + index))
            return h, h if keep else None

        if part.depth == 1 and self.remat == "none":
            h, kept = step(layer, h, 0, skips[0] if skips else None)
            return h, [kept] if keep else []
        blocks = layer["blocks"] if part.depth > 1 else {"0": layer}
        how: Any = {"depth": part.depth, "scan": part.depth > 1, "remat": self.remat}
        h, kept = run_blocks(blocks, h, step, inputs=jnp.stack(skips) if skips else None, **how)
        return h, [kept[i] for i in range(part.depth)] if keep else []


def _stage_options(
    rank: int, condition: int, text: TextConfig | None, own: Mapping[str, Any]
) -> StageOptions:
    text_dim = (text.features or text.dim) if text else 0
    return StageOptions(rank=rank, condition=condition, text_dim=text_dim, **own)


def _check_kinds(**fields: str) -> None:
    for field, value in fields.items():
        check_choice(f"{SECTION}.{field}", value, KINDS[field])


def _check_even_sizes(**fields: int) -> None:
    for field, size in fields.items():
        check_positive(SECTION, **{field: size})
        check_even(f"{SECTION}.{field}", size)


def _heads(options: StageOptions, heads: int, head_dim: int | None, width: int) -> int:
    """Heads of an attention of this width; ConfigError where they do not fit."""
    count = head_count(SECTION, width, heads, head_dim)
    check_attention(f"{SECTION}.attention", options.attention, width // count, options.dtype)
    return count


def _make_pyramid(
    options: StageOptions, channels: int, plan: Plan, rngs: nnx.Rngs, encoder: str
) -> Any:
    """Strided convolutions that bring the input to the levels of a residual encoder."""
    if encoder == "standard":
        return None
    layers, width = {}, channels
    for part in plan.down:
        if part.kind == "downsample":
            layers[part.name] = make_resampler(options, part.kind, width, part.source, rngs)
            width = part.source
    return nnx.Dict(layers)
