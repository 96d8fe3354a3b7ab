"""Diffusion transformer (Peebles & Xie 2023): patches, adaLN-zero blocks, stacked and scanned."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from diffusion_jax.errors import ConfigError
from diffusion_jax.networks.attention import ATTENTIONS, SelfAttention
from diffusion_jax.networks.embeddings import ConditionEmbedding, sincos_positions
from diffusion_jax.networks.layers import (
    ZEROS,
    FeedForward,
    Linear,
    constrain_batch,
    dropout,
    fold_key,
)
from diffusion_jax.networks.validation import (
    check_choice,
    check_common,
    check_divides,
    check_example,
    check_positive,
    check_spatial,
)

# "dots" keeps the results of the linear layers and recomputes the cheap rest; "full" keeps the
# input of each block alone.
REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
POSITIONS = ("sincos", "learned")
NOISE_FEATURES = 256


class Block(nnx.Module):
    """Transformer block whose norms and residual gates the condition sets; identity at first."""

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        expansion: int,
        dropout: float,
        attention: str,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.dropout = dropout
        self.norm = nnx.LayerNorm(dim, use_bias=False, use_scale=False, dtype=dtype, rngs=rngs)
        self.ada = Linear(dim, 6 * dim, kernel_init=ZEROS, dtype=dtype, rngs=rngs)
        self.attention = SelfAttention(dim, heads, implementation=attention, dtype=dtype, rngs=rngs)
        self.mlp = FeedForward(dim, expansion * dim, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b n d"],
        condition: Float[Array, "b d"],
        key: Key[Array, "*k"] | None,
    ) -> Float[Array, "b n d"]:
        modulation = self.ada(condition)[:, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation, 6, axis=-1)
        h = self.attention(self.norm(x) * (1 + scale1) + shift1)
        x = x + gate1 * dropout(h, self.dropout, fold_key(key, 0))
        h = self.mlp(self.norm(x) * (1 + scale2) + shift2)
        return constrain_batch(x + gate2 * dropout(h, self.dropout, fold_key(key, 1)))


class DiT(nnx.Module):
    """Transformer over patches of `(height, width, channels)`, or any number of spatial axes.

    Args:
        shape: shape of an example, channels last.
        patch: side of a patch.
        dim: width of the residual stream.
        depth: number of blocks.
        heads: attention heads.
        expansion: hidden size of the feed-forward layers over `dim`.
        positions: `sincos` (fixed) or `learned`.
        dropout: rate on both branches of a block; active when a key is given.
        num_classes: 0 for an unconditional network.
        out_channels: channels of the output; None: those of the input.
        scan: keep the blocks' parameters stacked (`blocks/...` with a leading depth axis) and run
            them as one `lax.scan`; else `blocks/0/...`, unrolled. `stacking.py` converts.
        remat: what the backward pass recomputes: `none`, `dots` or `full`.
        attention: implementation, `auto`, `xla` or `cudnn`.
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
        dim: int = 384,
        depth: int = 12,
        heads: int = 6,
        expansion: int = 4,
        positions: str = "sincos",
        dropout: float = 0.0,
        num_classes: int = 0,
        out_channels: int | None = None,
        scan: bool = True,
        remat: str = "none",
        attention: str = "auto",
        noise_input: str = "logsnr",
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_spatial("network.dit", shape)
        dtype = check_common("network.dit", num_classes, dropout, noise_input, dtype)
        out_channels = shape[-1] if out_channels is None else out_channels
        check_positive("network.dit", dim=dim, depth=depth, expansion=expansion)
        check_positive("network.dit", out_channels=out_channels)
        check_divides("network.dit.heads", heads, dim, "network.dit.dim")
        check_choice("network.dit.remat", remat, REMAT)
        check_choice("network.dit.attention", attention, ATTENTIONS)
        self.shape, self.noise_input, self.dtype = tuple(shape), noise_input, dtype
        self.patch, self.scan, self.remat, self.depth = patch, scan, remat, depth
        self.out_channels, self.grid = out_channels, patch_grid(self.shape[:-1], patch)
        self.positions = position_table(positions, self.grid, dim, rngs)
        volume = patch ** len(self.grid)
        self.stem = Linear(volume * self.shape[-1], dim, dtype=dtype, rngs=rngs)
        self.condition = ConditionEmbedding(
            noise_input, NOISE_FEATURES, dim, num_classes, stddev=0.02, dtype=dtype, rngs=rngs
        )

        block = functools.partial(
            Block,
            dim,
            heads,
            expansion=expansion,
            dropout=dropout,
            attention=attention,
            dtype=dtype,
        )

        self.blocks = stacked(block, rngs, depth) if scan else numbered(block, rngs, depth)
        self.norm = nnx.LayerNorm(dim, use_bias=False, use_scale=False, dtype=dtype, rngs=rngs)
        self.ada = Linear(dim, 2 * dim, kernel_init=ZEROS, dtype=dtype, rngs=rngs)
        self.head = Linear(
            dim, volume * self.out_channels, kernel_init=ZEROS, dtype=dtype, rngs=rngs
        )

    def __call__(
        self,
        x: Float[Array, "b *space c"],
        noise: Float[Array, " b"],
        conditioning: Mapping[str, Array],
        *,
        key: Key[Array, "*k"] | None = None,
    ) -> Float[Array, "b *space d"]:
        check_example(x, self.shape)
        h = self.stem(to_patches(x.astype(self.dtype), self.patch))
        if self.positions is None:
            table = jnp.asarray(sincos_positions(self.grid, h.shape[-1]))
        else:
            table = self.positions[...]
        h = constrain_batch(h + table.astype(self.dtype))
        condition = constrain_batch(jax.nn.silu(self.condition(noise, conditioning)))
        h = self._run_blocks(h, condition, key)
        shift, scale = jnp.split(self.ada(condition)[:, None], 2, axis=-1)
        h = self.head(self.norm(h) * (1 + scale) + shift)
        return from_patches(h, self.grid, self.patch, self.out_channels).astype(jnp.float32)

    def _run_blocks(
        self, x: Float[Array, "b n d"], condition: Float[Array, "b d"], key: Array | None
    ) -> Float[Array, "b n d"]:
        def body(x: Array, numbered: tuple[Block, Int[Array, ""]]) -> tuple[Array, None]:
            block, index = numbered
            return block(x, condition, fold_key(key, index)), None

        if self.remat != "none":
            # Inside a scan common subexpressions cannot undo the recomputation.
            body = jax.checkpoint(body, policy=REMAT[self.remat], prevent_cse=not self.scan)
        indices = jnp.arange(self.depth)
        if self.scan:
            return jax.lax.scan(body, x, (self.blocks, indices))[0]
        for i in range(self.depth):
            x, _ = body(x, (self.blocks[str(i)], indices[i]))
        return x


def stacked(make: Callable[..., nnx.Module], rngs: nnx.Rngs, depth: int) -> Any:
    """One module whose parameters have a leading axis of `depth` (a module is a pytree)."""
    return jax.vmap(lambda key: make(rngs=nnx.Rngs(key)))(jax.random.split(rngs.params(), depth))


def numbered(make: Callable[..., nnx.Module], rngs: nnx.Rngs, depth: int) -> Any:
    """`depth` modules under "0", "1", ..., with the same weights as `stacked`."""
    keys = jax.random.split(rngs.params(), depth)
    return nnx.Dict({str(i): make(rngs=nnx.Rngs(key)) for i, key in enumerate(keys)})


def position_table(
    kind: str, grid: Sequence[int], dim: int, rngs: nnx.Rngs
) -> nnx.Param[Array] | None:
    """A learned table, or None for the fixed one; ConfigError where that does not fit `dim`."""
    check_choice("network.dit.positions", kind, POSITIONS)
    if kind == "learned":
        normal = nnx.initializers.normal(0.02)
        return nnx.Param(normal(rngs.params(), (math.prod(grid), dim), jnp.float32))
    if dim % (2 * len(grid)):
        raise ConfigError(
            f"network.dit.dim={dim}: sincos positions over {len(grid)} axes need a multiple of "
            f"{2 * len(grid)}; or positions=learned"
        )
    return None


def patch_grid(space: Sequence[int], patch: int) -> tuple[int, ...]:
    """Number of patches along each axis; ConfigError unless `patch` divides all of them."""
    check_divides("network.dit.patch", patch, math.gcd(*space), f"all sides of {tuple(space)}")
    return tuple(size // patch for size in space)


def to_patches(x: Float[Array, "b *space c"], patch: int) -> Float[Array, "b n p"]:
    """Cuts every spatial axis into patches: tokens in C order, a patch flattened in C order."""
    b, *space, c = x.shape
    rank = len(space)
    split = x.reshape(b, *(n for size in space for n in (size // patch, patch)), c)
    order = [0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), 2 * rank + 1]
    return split.transpose(order).reshape(b, -1, patch**rank * c)


def from_patches(
    tokens: Float[Array, "b n p"], grid: Sequence[int], patch: int, channels: int
) -> Float[Array, "b *space c"]:
    """The inverse of `to_patches`."""
    rank, b = len(grid), tokens.shape[0]
    split = tokens.reshape(b, *grid, *(patch,) * rank, channels)
    order = [0, *(n for i in range(rank) for n in (1 + i, 1 + rank + i)), 2 * rank + 1]
    return split.transpose(order).reshape(b, *(n * patch for n in grid), channels)
