"""Transformer blocks, and how a stack of them is kept, run and recomputed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from diffusion_jax.networks.attention import (
    ATTENTIONS,
    CrossAttention,
    SelfAttention,
    check_attention,
)
from diffusion_jax.networks.layers import (
    ZEROS,
    FeedForward,
    Linear,
    constrain_batch,
    dropout,
    fold_key,
)
from diffusion_jax.networks.validation import check_choice, check_divides, check_positive


def _keep_products(primitive: Any, *args: Any, **params: Any) -> bool:
    """Policy of "dots": linear layers are dots without batch dimensions, attention's have some."""
    dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return primitive.name == "conv_general_dilated" or dots(primitive, *args, **params)


# "dots" keeps the results of linear layers and convolutions and recomputes the cheap rest; "full"
# keeps the input of each block alone.
REMAT = {
    "none": None,
    "dots": _keep_products,
    "full": jax.checkpoint_policies.nothing_saveable,
}
FEED_FORWARDS = ("gelu", "swiglu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockOptions:
    """What all blocks of a network have in common.

    Attributes:
        dim: width of the tokens.
        heads: attention heads.
        expansion: hidden size of the feed-forward layers over `dim`.
        mlp: `gelu`, or `swiglu`, gated and of as many parameters.
        qk_norm: normalise queries and keys.
        dropout: rate on both branches; active when a key is given.
        attention: implementation, see `attend`.
        dtype: compute dtype.
    """

    dim: int
    heads: int
    expansion: int = 4
    mlp: str = "gelu"
    qk_norm: bool = False
    dropout: float = 0.0
    attention: str = "auto"
    dtype: Any = jnp.float32

    def check(self, section: str, *, depth: int, remat: str) -> None:
        """Raises ConfigError naming `<section>.<field>` for a value that cannot work."""
        check_positive(section, dim=self.dim, depth=depth, expansion=self.expansion)
        check_divides(f"{section}.heads", self.heads, self.dim, f"{section}.dim")
        check_choice(f"{section}.mlp", self.mlp, FEED_FORWARDS)
        check_choice(f"{section}.remat", remat, REMAT)
        check_choice(f"{section}.attention", self.attention, ATTENTIONS)
        size = self.dim // self.heads
        check_attention(f"{section}.attention", self.attention, size, jnp.dtype(self.dtype))

    def self_attention(self, rngs: nnx.Rngs, *, bias: bool = True) -> SelfAttention:
        """The self-attention of a block."""
        return SelfAttention(
            self.dim,
            self.heads,
            qk_norm=self.qk_norm,
            bias=bias,
            implementation=self.attention,
            dtype=self.dtype,
            rngs=rngs,
        )

    def cross_attention(self, rngs: nnx.Rngs) -> CrossAttention:
        """The attention of a block to a context as wide as its tokens."""
        return CrossAttention(
            self.dim,
            self.dim,
            self.heads,
            qk_norm=self.qk_norm,
            implementation=self.attention,
            dtype=self.dtype,
            rngs=rngs,
        )

    def feed_forward(self, rngs: nnx.Rngs) -> nnx.Module:
        """The feed-forward layers of a block."""
        kind: Any = SwiGLU if self.mlp == "swiglu" else FeedForward
        hidden = self.expansion * self.dim
        return kind(self.dim, hidden, dtype=self.dtype, rngs=rngs)

    def norm(self, rngs: nnx.Rngs, *, affine: bool) -> nnx.LayerNorm:
        """A layer norm; `affine`: with a learned scale and shift of its own."""
        return nnx.LayerNorm(
            self.dim, use_bias=affine, use_scale=affine, dtype=self.dtype, rngs=rngs
        )


class SwiGLU(nnx.Module):
    """fc2(SiLU(gate x) * fc1 x) (Shazeer 2020), of as many parameters as `FeedForward`.

    The three matrices have 2/3 of `hidden`, to the nearest multiple of 8. The gate is a matrix of
    its own: split over devices like `fc1`, it meets the entries that it multiplies.
    """

    def __init__(self, dim: int, hidden: int, *, dtype: Any, rngs: nnx.Rngs):
        size = max(8 * round(hidden / 12), 8)
        self.fc1 = Linear(dim, size, dtype=dtype, rngs=rngs)
        self.gate_fc1 = Linear(dim, size, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(size, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        return self.fc2(jax.nn.silu(self.gate_fc1(x)) * self.fc1(x))


class Block(nnx.Module):
    """Pre-norm transformer block (Vaswani et al. 2017; U-ViT of Bao et al. 2023).

    Args:
        bias: whether the projection to queries, keys and values has a bias.
        skip: whether the block takes tokens of an earlier one, merged by a linear layer.
    """

    def __init__(
        self, options: BlockOptions, *, bias: bool = True, skip: bool = False, rngs: nnx.Rngs
    ):
        self.dropout = options.dropout
        dim = options.dim
        self.skip = Linear(2 * dim, dim, dtype=options.dtype, rngs=rngs) if skip else None
        self.norm1 = options.norm(rngs, affine=True)
        self.attention = options.self_attention(rngs, bias=bias)
        self.norm2 = options.norm(rngs, affine=True)
        self.mlp: Any = options.feed_forward(rngs)

    def __call__(
        self,
        x: Float[Array, "b n d"],
        key: Key[Array, "*k"] | None,
        *,
        skip: Float[Array, "b n d"] | None = None,
        mask: Bool[Array, "b n"] | None = None,
        angles: Float[np.ndarray, "n pairs"] | None = None,
        beside: int = 0,
    ) -> Float[Array, "b n d"]:
        if self.skip is not None and skip is not None:
            x = self.skip(jnp.concatenate([x, skip], axis=-1))
        h = self.attention(self.norm1(x), mask=mask, angles=angles, beside=beside)
        x = x + dropout(h, self.dropout, fold_key(key, 0))
        h = self.mlp(self.norm2(x))
        return constrain_batch(x + dropout(h, self.dropout, fold_key(key, 1)))


class AdaBlock(nnx.Module):
    """Block whose norms and residual gates the condition sets (adaLN-zero); identity at first.

    Args:
        cross: whether the block attends to a context between its two branches, as PixArt-alpha's
            (Chen et al. 2024) do: neither modulated nor gated, and from zero.
    """

    def __init__(self, options: BlockOptions, *, cross: bool = False, rngs: nnx.Rngs):
        self.dropout = options.dropout
        dim = options.dim
        self.norm = options.norm(rngs, affine=False)
        self.ada = Linear(dim, 6 * dim, kernel_init=ZEROS, dtype=options.dtype, rngs=rngs)
        self.attention = options.self_attention(rngs)
        self.cross_norm = options.norm(rngs, affine=True) if cross else None
        self.cross = options.cross_attention(rngs) if cross else None
        self.mlp: Any = options.feed_forward(rngs)

    def __call__(
        self,
        x: Float[Array, "b n d"],
        condition: Float[Array, "b d"],
        key: Key[Array, "*k"] | None,
        *,
        mask: Bool[Array, "b n"] | None = None,
        angles: Float[np.ndarray, "n pairs"] | None = None,
        beside: int = 0,
        context: Float[Array, "b m d"] | None = None,
        context_mask: Bool[Array, "b m"] | None = None,
    ) -> Float[Array, "b n d"]:
        modulation = self.ada(condition)[:, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation, 6, axis=-1)
        h = self.norm(x) * (1 + scale1) + shift1
        h = self.attention(h, mask=mask, angles=angles, beside=beside)
        x = x + gate1 * dropout(h, self.dropout, fold_key(key, 0))
        if self.cross is not None and self.cross_norm is not None and context is not None:
            h = self.cross(self.cross_norm(x), context, context_mask)
            x = x + dropout(h, self.dropout, fold_key(key, 2))
        h = self.mlp(self.norm(x) * (1 + scale2) + shift2)
        return constrain_batch(x + gate2 * dropout(h, self.dropout, fold_key(key, 1)))


def make_blocks(make: Callable[..., nnx.Module], rngs: nnx.Rngs, depth: int, *, scan: bool) -> Any:
    """`depth` modules of `make(rngs=...)`: one whose parameters have a leading axis of `depth` (a
    module is a pytree), or, unless `scan`, modules of the same weights under "0", "1", ..."""
    keys = jax.random.split(rngs.params(), depth)
    if scan:
        return jax.vmap(lambda key: make(rngs=nnx.Rngs(key)))(keys)
    return nnx.Dict({str(i): make(rngs=nnx.Rngs(key)) for i, key in enumerate(keys)})


def run_blocks(
    blocks: Any,
    x: Any,
    step: Callable[[Any, Any, Any, Any], tuple[Any, Any]],
    *,
    depth: int,
    scan: bool,
    remat: str,
    inputs: Any = None,
) -> tuple[Any, Any]:
    """Runs the blocks of `make_blocks` one after another.

    Args:
        x: what goes from block to block: tokens, or a tree.
        step: (block, x, index of the block, its input) -> (x, what to keep or None).
        remat: one of `REMAT`.
        inputs: None, or a tree with a leading axis of `depth`, one entry a block.

    Returns:
        The last x, and what was kept, stacked along a leading axis.
    """

    def body(x: Any, entry: Any) -> tuple[Any, Any]:
        block, index, one = entry
        return step(block, x, index, one)

    # One block is not scanned, so that it may change the shape of what goes through it.
    scanned = scan and depth > 1
    if remat != "none":
        # Inside a scan common subexpressions cannot undo the recomputation.
        body = jax.checkpoint(body, policy=REMAT[remat], prevent_cse=not scanned)
    indices = jnp.arange(depth)
    if scanned:
        return jax.lax.scan(body, x, (blocks, indices, inputs))
    kept = []
    for i in range(depth):
        block = jax.tree.map(lambda leaf, i=i: leaf[i], blocks) if scan else blocks[str(i)]
        one = jax.tree.map(lambda leaf, i=i: leaf[i], inputs)
        x, result = body(x, (block, indices[i], one))
        kept.append(result)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *kept)
