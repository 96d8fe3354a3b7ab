"""Diffusion transformer (Peebles & Xie 2023): patches, adaLN-zero blocks, stacked and scanned."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from diffusion_jax.errors import ConfigError
from diffusion_jax.networks.blocks import AdaBlock, BlockOptions, make_blocks, run_blocks
from diffusion_jax.networks.embeddings import ConditionEmbedding
from diffusion_jax.networks.layers import ZEROS, Linear, constrain_batch, fold_key
from diffusion_jax.networks.patches import (
    from_patches,
    learned_tokens,
    make_layout,
    to_patches,
)
from diffusion_jax.networks.text import Text, TextConditioning, TextConfig
from diffusion_jax.networks.validation import (
    check_choice,
    check_common,
    check_example,
    check_not_negative,
    check_positive,
    check_spatial,
)

TEXT_BY = ("cross", "in_context")
NOISE_FEATURES = 256


class DiT(nnx.Module):
    """Transformer over patches of `(height, width, channels)`, or any number of spatial axes.

    Class, numbers and the pooled text set the norms and gates of the blocks together with the noise
    level (adaLN-zero); the tokens of a text are attended to.

    Args:
        shape: shape of an example, channels last.
        patch: side of a patch.
        bottleneck: width of a linear layer between a patch and its token, which keeps the stem of
            large patches of pixels small (Li & He 2025, JiT); 0: none.
        dim: width of the residual stream.
        depth: number of blocks.
        heads: attention heads.
        expansion: hidden size of the feed-forward layers over `dim`.
        mlp: `gelu`, or `swiglu` of as many parameters (Shazeer 2020).
        positions: `sincos` (fixed), `learned`, or `rope` (rotary, over all axes).
        qk_norm: normalise queries and keys by their root mean square.
        registers: learned tokens beside the patches (Darcet et al. 2024).
        dropout: rate on the branches of a block; active when a key is given.
        num_classes: 0 for a network without classes.
        scalars: how many numbers describe an example (`scalar` of the conditioning); 0: none.
        text: how captions are read; None: the network takes none.
        text_by: `cross`: blocks attend to the text; `in_context`: its tokens join the patches'.
        out_channels: channels of the output; None: those of the input.
        features_after: number of blocks whose result `return_features` gives (8 of 28 in REPA,
            Yu et al. 2025); 0: the network is not asked for features.
        scan: keep the blocks' parameters stacked (`blocks/...` with a leading depth axis) and run
            them as one `lax.scan`; else `blocks/0/...`, unrolled. `stacking.py` converts.
        remat: what the backward pass recomputes: `none`, `dots` or `full`.
        attention: implementation, `auto`, `xla`, `cudnn` or `identity`.
        noise_input: unit of the noise argument (`logsnr`, `t`, `c_noise`, `timestep`).
        dtype: compute dtype; parameters and output are float32.

    Raises:
        ConfigError: a size that cannot work, naming `network.dit.<field>`.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        patch: int = 2,
        bottleneck: int = 0,
        dim: int = 384,
        depth: int = 12,
        heads: int = 6,
        expansion: int = 4,
        mlp: str = "gelu",
        positions: str = "sincos",
        qk_norm: bool = False,
        registers: int = 0,
        dropout: float = 0.0,
        num_classes: int = 0,
        scalars: int = 0,
        text: TextConfig | None = None,
        text_by: str = "cross",
        out_channels: int | None = None,
        features_after: int = 0,
        scan: bool = True,
        remat: str = "none",
        attention: str = "auto",
        noise_input: str = "logsnr",
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        section = "network.dit"
        check_spatial(section, shape)
        dtype = check_common(section, num_classes, dropout, noise_input, dtype, scalars=scalars)
        check_choice(f"{section}.text_by", text_by, TEXT_BY)
        check_not_negative(section, bottleneck=bottleneck, registers=registers)
        sizes = {"dim": dim, "heads": heads, "expansion": expansion, "dropout": dropout}
        kinds: Any = {"mlp": mlp, "qk_norm": qk_norm, "attention": attention, "dtype": dtype}
        options = BlockOptions(**sizes, **kinds)
        options.check(section, depth=depth, remat=remat)
        _check_features(features_after, depth)
        self.shape, self.noise_input, self.dtype = tuple(shape), noise_input, dtype
        self.patch, self.scan, self.remat, self.depth = patch, scan, remat, depth
        self.out_channels = self.shape[-1] if out_channels is None else out_channels
        check_positive(section, out_channels=self.out_channels)
        self.features_after = features_after
        cross = text is not None and text_by == "cross"
        self.in_context = text is not None and not cross
        self.layout = make_layout(section, positions, shape, patch, dim, heads)
        self.positions = self.layout.table(rngs)
        self.registers = learned_tokens(registers, dim, rngs)
        self._build_ends(options, bottleneck, rngs)
        shared: Any = {"stddev": 0.02, "dtype": dtype, "rngs": rngs}
        running: Any = {"scan": scan, "remat": remat, "attention": attention}
        self.text = (
            TextConditioning(text, dim=dim, pooled_dim=dim, **running, **shared) if text else None
        )
        self.condition = ConditionEmbedding(
            noise_input, NOISE_FEATURES, dim, num_classes, scalars=scalars, **shared
        )
        make = functools.partial(AdaBlock, options, cross=cross)
        self.blocks = make_blocks(make, rngs, depth, scan=scan)

    def _build_ends(self, options: BlockOptions, bottleneck: int, rngs: nnx.Rngs) -> None:
        """From pixels to tokens, and back."""
        dim, dtype, volume = options.dim, options.dtype, self.patch ** (len(self.shape) - 1)
        size = volume * self.shape[-1]
        self.bottleneck = (
            Linear(size, bottleneck, use_bias=False, dtype=dtype, rngs=rngs) if bottleneck else None
        )
        self.stem = Linear(bottleneck or size, dim, dtype=dtype, rngs=rngs)
        self.norm = options.norm(rngs, affine=False)
        self.ada = Linear(dim, 2 * dim, kernel_init=ZEROS, dtype=dtype, rngs=rngs)
        out = volume * self.out_channels
        self.head = Linear(dim, out, kernel_init=ZEROS, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b *space c"],
        noise: Float[Array, " b"],
        conditioning: Mapping[str, Array],
        *,
        key: Key[Array, "*k"] | None = None,
        return_features: bool = False,
    ) -> Any:
        """The output [b, *space, d]; with `return_features` the pair of it and the patches' tokens
        [b, n, dim] after `features_after` blocks, float32."""
        check_example(x, self.shape)
        if return_features and not self.features_after:
            raise ConfigError(
                "network.dit.features_after=0: features are asked for; "
                f"name the number of blocks before them, 1 to {self.depth}"
            )
        patches = to_patches(x.astype(self.dtype), self.patch)
        h = self.stem(patches if self.bottleneck is None else self.bottleneck(patches))
        h = constrain_batch(self.layout.place(h, self.positions))
        text = Text(None, None, None)
        if self.text is not None:
            text = self.text(conditioning, x.shape[0])
        condition = self.condition(noise, conditioning, text.pooled)
        condition = constrain_batch(jax.nn.silu(condition))
        h, features = self._run_blocks(h, condition, text, key, return_features)
        shift, scale = jnp.split(self.ada(condition)[:, None], 2, axis=-1)
        h = self.head(self.norm(h) * (1 + scale) + shift)
        h = from_patches(h, self.layout.grid, self.patch, self.out_channels)
        output = h.astype(jnp.float32)
        return (output, features) if return_features else output

    def _run_blocks(
        self,
        patches: Float[Array, "b n d"],
        condition: Float[Array, "b d"],
        text: Text,
        key: Key[Array, "*k"] | None,
        return_features: bool,
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b n d"] | None]:
        """The patches after all blocks, registers and in-context text beside them; features."""
        batch, number = patches.shape[:2]
        beside = []
        if self.registers is not None:
            registers = self.registers[...].astype(patches.dtype)
            beside.append(jnp.broadcast_to(registers, (batch, *registers.shape)))
        mask, shared = None, dict[str, Any]()
        if self.in_context:
            before = sum(tokens.shape[1] for tokens in beside)
            beside.append(text.tokens)
            mask = jnp.pad(text.mask, ((0, 0), (before, number)), constant_values=True)
        elif self.text is not None:
            shared |= {"context": text.tokens, "context_mask": text.mask}
        x = jnp.concatenate([*beside, patches], axis=1) if beside else patches
        shared["beside"] = x.shape[1] - number
        angles = self.layout.angles(x.shape[1] - number)

        def step(block: AdaBlock, carry: Any, index: Any, unused: Any) -> tuple[Any, None]:
            x, features = carry
            part = fold_key(key, index)
            x = block(x, condition, part, mask=mask, angles=angles, **shared)
            if return_features:
                # Carried along, not stacked: scan would keep the tokens of all blocks.
                features = jnp.where(index == self.features_after - 1, x[:, -number:], features)
            return (x, features), None

        carry = (x, jnp.zeros_like(patches) if return_features else None)
        how: Any = {"depth": self.depth, "scan": self.scan, "remat": self.remat}
        (x, features), _ = run_blocks(self.blocks, carry, step, **how)
        return x[:, -number:], None if features is None else features.astype(jnp.float32)


def _check_features(features_after: int, depth: int) -> None:
    if not 0 <= features_after <= depth:
        raise ConfigError(
            f"network.dit.features_after={features_after}: expected 0 (none) to {depth} blocks"
        )
