"""Text as a condition: a small byte encoder trained with the network, or a frozen one's output.

A caption is UTF-8 bytes + 1, padded with zeros. Both ways give tokens for attention and one pooled
vector, and both have a null that stands for a caption dropped (`text_keep`), empty or not given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from diffusion_jax.networks.blocks import Block, BlockOptions, make_blocks, run_blocks
from diffusion_jax.networks.layers import Linear
from diffusion_jax.networks.positions import TEXT_BASE, axial_angles, check_rotary
from diffusion_jax.networks.validation import check_positive

SYMBOLS = 257
"""Padding and the 256 bytes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    """How a network reads captions.

    Attributes:
        dim: width of the byte encoder.
        depth: its blocks.
        heads: its attention heads.
        features: 0 for captions of bytes, read by a byte encoder that trains with the network; else
            the width of a frozen encoder's tokens, given instead of bytes, and only projected.
    """

    dim: int = 128
    depth: int = 2
    heads: int = 4
    features: int = 0

    def check(self) -> None:
        """Raises ConfigError naming `text.bytes.<field>` for a size that cannot work."""
        if self.features:
            check_positive("text", features=self.features)
            return
        section = "text.bytes"
        BlockOptions(dim=self.dim, heads=self.heads).check(section, depth=self.depth, remat="none")
        check_rotary(f"{section}.heads", self.dim, self.heads, axes=1)


class Text(NamedTuple):
    """An encoded text.

    Attributes:
        tokens: [b, l, d]; None where a network has no use for them.
        mask: bool [b, l], False for padding; at least one True a row.
        pooled: [b, e], one vector a text; None where a network has no use for it.
    """

    tokens: Any
    mask: Any
    pooled: Any


class ByteEncoder(nnx.Module):
    """Pre-norm transformer over bytes with rotary positions, so that any length can be read.

    Args:
        config: sizes.
        scan, remat: as of the network that the encoder is part of.
        attention: implementation, see `attend`.
    """

    def __init__(
        self,
        config: TextConfig,
        *,
        scan: bool = True,
        remat: str = "none",
        attention: str = "auto",
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.dtype, self.scan, self.remat = dtype, scan, remat
        self.depth, self.head_dim = config.depth, config.dim // config.heads
        # Every attention here has a mask, which no fused kernel takes.
        options = BlockOptions(
            dim=config.dim,
            heads=config.heads,
            attention={"cudnn": "xla", "identity": "auto"}.get(attention, attention),
            dtype=dtype,
        )
        normal = nnx.initializers.normal(1.0)
        self.table = nnx.Param(normal(rngs.params(), (SYMBOLS, config.dim), jnp.float32))

        def block(*, rngs: nnx.Rngs) -> Block:
            return Block(options, rngs=rngs)

        self.blocks = make_blocks(block, rngs, config.depth, scan=scan)
        self.norm = options.norm(rngs, affine=True)

    def __call__(self, text: Int[Array, "b l"]) -> Text:
        """Tokens [b, l, dim], mask [b, l] and their masked mean [b, dim] of bytes + 1.

        Padding changes nothing. A number that is no byte gives NaN, never another byte's vector.
        """
        mask = text != 0
        x = (
            self.table[...]
            .at[text]
            .get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        )
        angles = axial_angles(text.shape[1:], self.head_dim, base=TEXT_BASE)
        # An empty text attends to its first padding: a softmax needs at least one key.
        visible = mask.at[:, 0].set(True)

        def step(block: Block, x: Any, index: Any, unused: Any) -> tuple[Any, None]:
            return block(x, None, mask=visible, angles=angles), None

        x, _ = run_blocks(
            self.blocks,
            x.astype(self.dtype),
            step,
            depth=self.depth,
            scan=self.scan,
            remat=self.remat,
        )
        tokens = self.norm(x)
        return Text(tokens, mask, masked_mean(tokens, mask))


class TextConditioning(nnx.Module):
    """The text of a conditioning, as a network takes it; owns the null embeddings.

    Reads of the conditioning, all optional: `text`, int `[b, l]` (bytes + 1, 0 pads), or float
    `[b, l, features]` with `text_mask`, bool `[b, l]`; `text_keep`, bool `[b]`.

    Args:
        config: encoder, or width of a frozen one.
        dim: width of the tokens; 0: the network has no use for tokens.
        pooled_dim: width of the pooled vector; 0: the network has no use for one.
        stddev: of the null embeddings at the start.
        scan, remat, attention: as of the network.
    """

    def __init__(
        self,
        config: TextConfig,
        *,
        dim: int = 0,
        pooled_dim: int = 0,
        stddev: float = 0.02,
        scan: bool = True,
        remat: str = "none",
        attention: str = "auto",
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        config.check()
        self.dtype, self.features = dtype, config.features
        width = config.features or config.dim
        # Frozen encoders differ by orders of magnitude in the scale of their tokens.
        self.norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs) if config.features else None
        layout: Any = {"scan": scan, "remat": remat, "attention": attention}
        self.encoder = (
            None if config.features else ByteEncoder(config, **layout, dtype=dtype, rngs=rngs)
        )
        normal = nnx.initializers.normal(stddev)

        def null(size: int) -> nnx.Param[Array] | None:
            return nnx.Param(normal(rngs.params(), (size,), jnp.float32)) if size else None

        self.project = Linear(width, dim, dtype=dtype, rngs=rngs) if dim else None
        self.pool = Linear(width, pooled_dim, dtype=dtype, rngs=rngs) if pooled_dim else None
        self.null, self.null_pooled = null(dim), null(pooled_dim)

    def __call__(self, conditioning: Mapping[str, Array], batch: int) -> Text:
        """Tokens, mask and pooled vector; the null's is one token.

        Raises:
            ValueError: `text` is not what the network was built for.
        """
        text, keep = conditioning.get("text"), conditioning.get("text_keep")
        if text is None:
            tokens = self._spread(self.null, (batch, 1))
            return Text(
                tokens, jnp.ones((batch, 1), bool), self._spread(self.null_pooled, (batch,))
            )
        encoded = self._encode(text, conditioning.get("text_mask"))
        present = encoded.mask.any(axis=1)
        if keep is not None:
            present &= keep
        tokens = pooled = None
        if self.project is not None:
            null = self._spread(self.null, encoded.mask.shape)
            tokens = jnp.where(present[:, None, None], self.project(encoded.tokens), null)
        if self.pool is not None:
            null = self._spread(self.null_pooled, (batch,))
            pooled = jnp.where(present[:, None], self.pool(encoded.pooled), null)
        # One token of the null is seen, so that a dropped text is exactly an absent one.
        first = jnp.arange(encoded.mask.shape[1]) == 0
        return Text(tokens, jnp.where(present[:, None], encoded.mask, first), pooled)

    def _spread(self, null: nnx.Param[Array] | None, shape: tuple[int, ...]) -> Any:
        """The null at every place of `shape`."""
        if null is None:
            return None
        return jnp.broadcast_to(null[...], (*shape, *null.shape)).astype(self.dtype)

    def _encode(self, text: Array, mask: Array | None) -> Text:
        """What the encoder says of bytes, or a frozen encoder's tokens, normalised."""
        if self.encoder is not None:
            if text.ndim != 2 or not jnp.issubdtype(text.dtype, jnp.integer):
                raise ValueError(
                    f"text is {text.dtype} {text.shape}; this network reads bytes + 1, integers "
                    "[batch, length]; for a frozen encoder's tokens set TextConfig.features"
                )
            return self.encoder(text)
        if self.norm is None or text.ndim != 3 or text.shape[-1] != self.features:
            raise ValueError(
                f"text is {text.dtype} {text.shape}; this network takes a frozen encoder's tokens, "
                f"[batch, length, {self.features}]"
            )
        if mask is None:
            mask = jnp.ones(text.shape[:2], bool)
        tokens = self.norm(jnp.where(mask[..., None], text, 0.0))
        return Text(tokens, mask, masked_mean(tokens, mask))


def masked_mean(tokens: Float[Array, "b l d"], mask: Bool[Array, "b l"]) -> Float[Array, "b d"]:
    """Mean of the tokens under the mask, summed in float32; zeros where there are none."""
    kept = jnp.where(mask[..., None], tokens, 0).astype(jnp.float32)
    count = jnp.maximum(mask.sum(axis=1), 1)
    return (kept.sum(axis=1) / count[:, None]).astype(tokens.dtype)
