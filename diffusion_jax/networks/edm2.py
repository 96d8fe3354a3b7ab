"""The magnitude-preserving U-Net of EDM2, configuration G (Karras et al. 2024, arXiv:2312.02696).

No biases, no group norms, no learned scales but one gain a block and one of the output, both from
zero: activations, weights and so the effective learning rate keep their magnitude as training goes
on. Blocks of one shape that follow each other are stacked and run as one scan.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from diffusion_jax.networks.attention import ATTENTIONS, check_attention
from diffusion_jax.networks.blocks import REMAT, make_blocks, run_blocks
from diffusion_jax.networks.conv import double
from diffusion_jax.networks.edm2_layers import (
    MPAttention,
    MPConv,
    MPCrossAttention,
    MPLabel,
    MPScalars,
    mp_cat,
    mp_fourier,
    mp_silu,
    mp_sum,
    pixel_norm,
    unit_weights,
)
from diffusion_jax.networks.edm2_plan import BlockOptions, Run, plan_runs
from diffusion_jax.networks.layers import constrain_batch, dropout, fold_key
from diffusion_jax.networks.resampling import mean_pool
from diffusion_jax.networks.text import Text, TextConditioning, TextConfig
from diffusion_jax.networks.unet_plan import attended_levels, head_count, level_sizes
from diffusion_jax.networks.validation import (
    check_choice,
    check_common,
    check_example,
    check_positive,
    check_share,
    check_spatial,
)

LARGEST = 256.0
"""Activations are clipped here in float16, which would come near its end; other types are not."""

NORMALIZED = ("condition", "stem", "down", "middle", "up", "head")
"""Parts of the network whose kernels and tables are of unit magnitude."""


class MPBlock(nnx.Module):
    """Residual block, then attention where the run has it; both joined by `mp_sum`.

    On the way down the map is brought to its new width and to unit magnitude at each place before
    the branch; on the way up it is joined with a skip, and widened after the branch.
    """

    def __init__(self, options: BlockOptions, run: Run, *, rngs: nnx.Rngs):
        self.options, self.run = options, run
        entering, width = run.source + run.skip, run.width
        conv: Any = functools.partial(MPConv, dtype=options.dtype, rngs=rngs)
        self.widen = conv(entering, width) if entering != width else None
        first = entering if run.decoder else width
        self.conv1 = conv(first, width, rank=options.rank, size=3)
        self.ada = conv(options.condition, width)
        self.gain = nnx.Param(jnp.zeros((), jnp.float32))
        self.conv2 = conv(width, width, rank=options.rank, size=3)
        heads: Any = {"implementation": options.attention, "dtype": options.dtype, "rngs": rngs}
        self.attention = MPAttention(width, run.heads, **heads) if run.heads else None
        self.cross = (
            MPCrossAttention(width, options.text_dim, run.heads, **heads)
            if run.heads and options.text_dim
            else None
        )

    def __call__(
        self,
        x: Float[Array, "b *space c"],
        skip: Float[Array, "b *space s"] | None,
        condition: Float[Array, "b e"],
        text: Text,
        key: Key[Array, "*k"] | None,
    ) -> Float[Array, "b *out d"]:
        options, decoder = self.options, self.run.decoder
        if skip is not None:
            x = mp_cat(x, skip, options.skip_balance)
        if self.run.resample:
            x = mean_pool(x) if self.run.resample == "down" else double(x)
        if not decoder:
            x = pixel_norm(x if self.widen is None else self.widen(x))
        y = self.conv1(mp_silu(x))
        modulation = self.ada(condition, self.gain[...]) + 1
        y = mp_silu(y * jnp.expand_dims(modulation, tuple(range(1, y.ndim - 1))))
        y = self.conv2(dropout(y, options.dropout, key))
        if decoder and self.widen is not None:
            x = self.widen(x)
        x = mp_sum(x, y, options.residual_balance)
        if self.attention is not None:
            x = mp_sum(x, self.attention(x), options.attention_balance)
        if self.cross is not None:
            x = mp_sum(x, self.cross(x, text.tokens, text.mask), options.attention_balance)
        if options.dtype == jnp.float16:
            x = jnp.clip(x, -LARGEST, LARGEST)
        return constrain_batch(x)


class MPCondition(nnx.Module):
    """Embedding of the noise level and, by `mp_sum`, of class, numbers and text.

    Reads of the conditioning, all optional: `label` (int `[b]`), `scalar` (float `[b, k]`), and
    `label_keep`, `scalar_keep` (bool `[b]`, absent: keep all).
    """

    def __init__(
        self,
        noise_input: str,
        features: int,
        dim: int,
        *,
        num_classes: int,
        scalars: int,
        balance: float,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.noise_input, self.features, self.balance = noise_input, features, balance
        self.noise = MPConv(features, dim, dtype=dtype, rngs=rngs)
        self.label = MPLabel(num_classes, dim, rngs=rngs) if num_classes else None
        self.scalar = MPScalars(scalars, dim, dtype=dtype, rngs=rngs) if scalars else None

    def __call__(
        self,
        noise: Float[Array, " b"],
        conditioning: Mapping[str, Array],
        pooled: Float[Array, "b e"] | None,
    ) -> Float[Array, "b e"]:
        embedding = self.noise(mp_fourier(noise, self.features, self.noise_input))
        others = [] if pooled is None else [pixel_norm(pooled)]
        for name, part in (("label", self.label), ("scalar", self.scalar)):
            if part is not None:
                given, keep = conditioning.get(name), conditioning.get(f"{name}_keep")
                others.append(part(given, keep, noise.shape[0]).astype(embedding.dtype))
        if others:
            total = sum(others[1:], others[0]) / math.sqrt(len(others))
            embedding = mp_sum(embedding, total, self.balance)
        return mp_silu(embedding)


class EDM2(nnx.Module):
    """EDM2 over `(height, width, channels)`, or any other number of spatial axes.

    It expects inputs of unit variance and gives, but for its learned gain from zero, outputs of
    unit variance: what `prediction = "edm"` and `v` of unit-variance data ask for. Give the
    optimizer no weight decay, and put `Network.post_update` after each update.

    Args:
        shape: shape of an example, channels last: `(64, 64, 4)`, audio `(length, channels)`.
        channels: width of the first level.
        multipliers: width of each level over `channels`; each level but the first halves the map.
        blocks: blocks a level on the way down (one more on the way up).
        attention_resolutions: longer sides of the feature maps at which blocks have attention.
        head_dim: channels of an attention head.
        dropout: rate inside the blocks; active when a key is given.
        label_balance: share of class, numbers and text beside the noise level.
        residual_balance: share of a block's branch beside its input.
        attention_balance: share of attention beside its input.
        skip_balance: share of a skip beside the map that it joins.
        num_classes: 0 for an unconditional network.
        scalars: conditioning numbers, `scalar` `[b, scalars]`.
        text: encoder of captions, read by cross-attention where there is attention and, pooled,
            with the noise level. (Not in the paper.)
        out_channels: channels of the output; None: those of the input.
        scan: keep blocks of one shape that follow each other stacked (`up/level1_1/blocks/...`) and
            run them as one `lax.scan`; else `up/level1_1/blocks/0/...`. `stacking.py` converts.
        remat: what the backward pass recomputes: `none`, `dots` or `full`.
        attention: implementation, `auto`, `xla`, `cudnn` or `identity`.
        noise_input: unit of the noise argument (`c_noise` in the paper; `logsnr`, `t`, `timestep`).
        dtype: compute dtype; parameters and output are float32.

    Raises:
        ConfigError: a size that cannot work, naming `network.edm2.<field>`.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 2, 3, 4),
        blocks: int = 3,
        attention_resolutions: Sequence[int] = (16, 8),
        head_dim: int = 64,
        dropout: float = 0.0,
        label_balance: float = 0.5,
        residual_balance: float = 0.3,
        attention_balance: float = 0.3,
        skip_balance: float = 0.5,
        num_classes: int = 0,
        scalars: int = 0,
        text: TextConfig | None = None,
        out_channels: int | None = None,
        scan: bool = True,
        remat: str = "none",
        attention: str = "auto",
        noise_input: str = "c_noise",
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        section = "network.edm2"
        check_spatial(section, shape)
        out_channels = shape[-1] if out_channels is None else out_channels
        check_positive(section, channels=channels, blocks=blocks, out_channels=out_channels)
        check_choice(f"{section}.attention", attention, ATTENTIONS)
        check_choice(f"{section}.remat", remat, REMAT)
        dtype = check_common(section, num_classes, dropout, noise_input, dtype, scalars=scalars)
        check_attention(f"{section}.attention", attention, head_dim, dtype)
        balances = {
            "residual_balance": residual_balance,
            "attention_balance": attention_balance,
            "skip_balance": skip_balance,
        }
        check_share(section, label_balance=label_balance, **balances)
        self.shape, self.noise_input, self.dtype = tuple(shape), noise_input, dtype
        self.scan, self.remat = scan, remat
        sizes = level_sizes(section, self.shape[:-1], multipliers)
        attended = attended_levels(section, sizes, attention_resolutions)
        widths = [channels * multiplier for multiplier in multipliers]
        heads = [0] * len(widths)
        for level in {*attended, len(widths) - 1}:
            heads[level] = head_count(section, widths[level], 1, head_dim)
        options = BlockOptions(
            rank=len(self.shape) - 1,
            condition=max(widths),
            text_dim=(text.features or text.dim) if text else 0,
            dropout=dropout,
            attention=attention,
            dtype=dtype,
            **balances,
        )
        self._build_condition(options, channels, num_classes, scalars, text, label_balance, rngs)
        self._build_runs(options, plan_runs(widths, blocks, attended, heads), out_channels, rngs)

    def _build_condition(
        self,
        options: BlockOptions,
        features: int,
        num_classes: int,
        scalars: int,
        text: TextConfig | None,
        balance: float,
        rngs: nnx.Rngs,
    ) -> None:
        """Embeddings of noise, class and numbers, and the reader of captions."""
        dim, dtype = options.condition, options.dtype
        self.condition = MPCondition(
            self.noise_input,
            features,
            dim,
            num_classes=num_classes,
            scalars=scalars,
            balance=balance,
            dtype=dtype,
            rngs=rngs,
        )
        running: Any = {"scan": self.scan, "remat": self.remat, "attention": options.attention}
        sizes: Any = {"dim": options.text_dim, "pooled_dim": dim, "stddev": 1.0}
        self.text = (
            TextConditioning(text, **sizes, **running, dtype=dtype, rngs=rngs) if text else None
        )

    def _build_runs(
        self,
        options: BlockOptions,
        plan: Mapping[str, Sequence[Run]],
        out_channels: int,
        rngs: nnx.Rngs,
    ) -> None:
        """First layer, blocks and last layer."""
        common: Any = {"rank": options.rank, "size": 3, "dtype": options.dtype, "rngs": rngs}
        # A channel of ones stands in for the bias of the first layer.
        self.stem = MPConv(self.shape[-1] + 1, plan["down"][0].source, **common)

        def stacks(part: str) -> Any:
            return nnx.Dict(
                {
                    run.name: nnx.Dict(
                        {
                            "blocks": make_blocks(
                                functools.partial(MPBlock, options, run),
                                rngs,
                                run.depth,
                                scan=self.scan,
                            )
                        }
                    )
                    for run in plan[part]
                }
            )

        self.down, self.middle, self.up = stacks("down"), stacks("middle"), stacks("up")
        # Merged dicts come back sorted by name: the order of execution is kept apart.
        self.order = tuple((part, tuple(plan[part])) for part in ("down", "middle", "up"))
        self.head = MPConv(plan["up"][-1].width, out_channels, **common)
        self.gain = nnx.Param(jnp.zeros((), jnp.float32))

    @staticmethod
    def post_update(params: Mapping[str, Any]) -> dict[str, Any]:
        """Parameters with stored weights of unit magnitude (forced weight normalisation, eq. 66).

        The network computes the same with them. What is not the network's own, and its text
        encoder, stays as it is.
        """
        return {
            name: jax.tree_util.tree_map_with_path(_normalized, tree)
            if name in NORMALIZED
            else tree
            for name, tree in params.items()
        }

    def __call__(
        self,
        x: Float[Array, "b *space c"],
        noise: Float[Array, " b"],
        conditioning: Mapping[str, Array],
        *,
        key: Key[Array, "*k"] | None = None,
    ) -> Float[Array, "b *space d"]:
        check_example(x, self.shape)
        text = Text(None, None, None)
        if self.text is not None:
            text = self.text(conditioning, x.shape[0])
        condition = constrain_batch(self.condition(noise, conditioning, text.pooled))
        ones = jnp.ones((*x.shape[:-1], 1), x.dtype)
        h = constrain_batch(self.stem(jnp.concatenate([x, ones], axis=-1)))
        skips, part = [h], 0
        for name, runs in self.order:
            stacks = getattr(self, name)
            for run in runs:

                def step(
                    block: MPBlock, h: Any, index: Any, skip: Any, run: Run = run, first: int = part
                ) -> Any:
                    h = block(h, skip, condition, text, fold_key(key, first + index))
                    return h, h if run.keep else None

                joined = None
                if run.skip:
                    joined = jnp.stack([skips.pop() for _ in range(run.depth)])
                how: Any = {"depth": run.depth, "scan": self.scan, "remat": self.remat}
                h, kept = run_blocks(stacks[run.name]["blocks"], h, step, inputs=joined, **how)
                if run.keep:
                    skips.extend(kept[i] for i in range(run.depth))
                part += run.depth
        return self.head(h, self.gain[...]).astype(jnp.float32)


def _normalized(path: tuple[Any, ...], leaf: Array) -> Array:
    names = [str(entry.key) for entry in path]
    if names[-1] not in ("kernel", "table"):
        return leaf
    stacked = "blocks" in names and not names[names.index("blocks") + 1].isdecimal()
    return jax.vmap(unit_weights)(leaf) if stacked else unit_weights(leaf)
