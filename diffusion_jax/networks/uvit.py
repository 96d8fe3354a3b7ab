"""U-ViT (Bao et al. 2023): everything is a token, and long skips join early and late blocks."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from diffusion_jax.errors import ConfigError
from diffusion_jax.networks.blocks import Block, BlockOptions, make_blocks, run_blocks
from diffusion_jax.networks.conv import Conv
from diffusion_jax.networks.embeddings import (
    NOISE_SCALES,
    LabelEmbedding,
    ScalarEmbedding,
    sinusoidal,
)
from diffusion_jax.networks.layers import ZEROS, Linear, constrain_batch, fold_key
from diffusion_jax.networks.patches import from_patches, make_layout, to_patches
from diffusion_jax.networks.text import TextConditioning, TextConfig
from diffusion_jax.networks.validation import (
    check_common,
    check_even,
    check_example,
    check_positive,
    check_spatial,
)


class UViT(nnx.Module):
    """Transformer whose tokens are noise level, class, numbers, text and patches.

    The blocks are `depth // 2` on the way in, one in the middle and as many on the way out, each of
    which takes the output of its mirror image. Where classes, numbers and text are not given their
    nulls stand in.

    Args:
        shape: shape of an example, channels last, with any number of spatial axes.
        patch: side of a patch.
        dim: width of the residual stream.
        depth: number of blocks, odd.
        heads: attention heads.
        expansion: hidden size of the feed-forward layers over `dim`.
        mlp: `gelu`, or `swiglu` of as many parameters.
        positions: `learned` (for all tokens but the text's), `sincos` or `rope` (of the patches).
        qk_norm: normalise queries and keys by their root mean square.
        smooth: end with a convolution of size 3, over the seams of the patches.
        dropout: rate on both branches of a block; active when a key is given.
        num_classes: 0 for a network without classes.
        scalars: how many numbers describe an example (`scalar` of the conditioning); 0: none.
        text: how captions are read; None: the network takes none.
        out_channels: channels of the output; None: those of the input.
        scan: keep the parameters of both halves stacked (`down/blocks/...`, `up/blocks/...`) and
            run each as one `lax.scan`; else `down/blocks/0/...`. `stacking.py` converts.
        remat: what the backward pass recomputes: `none`, `dots` or `full`.
        attention: implementation, `auto`, `xla`, `cudnn` or `identity`.
        noise_input: unit of the noise argument (`logsnr`, `t`, `c_noise`, `timestep`).
        dtype: compute dtype; parameters and output are float32.

    Raises:
        ConfigError: a size that cannot work, naming `network.uvit.<field>`.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        patch: int = 2,
        dim: int = 512,
        depth: int = 13,
        heads: int = 8,
        expansion: int = 4,
        mlp: str = "gelu",
        positions: str = "learned",
        qk_norm: bool = False,
        smooth: bool = True,
        dropout: float = 0.0,
        num_classes: int = 0,
        scalars: int = 0,
        text: TextConfig | None = None,
        out_channels: int | None = None,
        scan: bool = True,
        remat: str = "none",
        attention: str = "auto",
        noise_input: str = "logsnr",
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        section = "network.uvit"
        check_spatial(section, shape)
        dtype = check_common(section, num_classes, dropout, noise_input, dtype, scalars=scalars)
        sizes = {"dim": dim, "heads": heads, "expansion": expansion, "dropout": dropout}
        kinds: Any = {"mlp": mlp, "qk_norm": qk_norm, "attention": attention, "dtype": dtype}
        options = BlockOptions(**sizes, **kinds)
        options.check(section, depth=depth, remat=remat)
        check_even(f"{section}.dim", dim)
        if depth % 2 == 0:
            raise ConfigError(
                f"{section}.depth={depth}: expected an odd number; nearest: {depth + 1}"
            )
        self.shape, self.noise_input, self.dtype, self.dim = tuple(shape), noise_input, dtype, dim
        self.patch, self.scan, self.remat, self.half = patch, scan, remat, depth // 2
        self.out_channels = self.shape[-1] if out_channels is None else out_channels
        check_positive(section, out_channels=self.out_channels)
        self.layout = make_layout(section, positions, shape, patch, dim, heads)
        shared: Any = {"stddev": 0.02, "dtype": dtype, "rngs": rngs}
        self.label = LabelEmbedding(num_classes, dim, **shared) if num_classes else None
        self.scalar = ScalarEmbedding(scalars, dim, **shared) if scalars else None
        running: Any = {"scan": scan, "remat": remat, "attention": attention}
        self.text = TextConditioning(text, dim=dim, **running, **shared) if text else None
        self.positions = self.layout.table(rngs, 1 + bool(num_classes) + bool(scalars))
        self._build_blocks(options, rngs)
        self._build_ends(options, smooth, rngs)

    def _build_blocks(self, options: BlockOptions, rngs: nnx.Rngs) -> None:
        plain = functools.partial(Block, options, bias=False)
        # Under names that the rules of tensor parallelism know.
        self.middle = nnx.Dict({"blocks": make_blocks(plain, rngs, 1, scan=self.scan)})
        if self.half:
            joined = functools.partial(plain, skip=True)
            self.down = nnx.Dict({"blocks": make_blocks(plain, rngs, self.half, scan=self.scan)})
            self.up = nnx.Dict({"blocks": make_blocks(joined, rngs, self.half, scan=self.scan)})
        self.norm = options.norm(rngs, affine=True)

    def _build_ends(self, options: BlockOptions, smooth: bool, rngs: nnx.Rngs) -> None:
        dim, dtype, rank = options.dim, options.dtype, len(self.layout.grid)
        volume, channels = self.patch**rank, self.out_channels
        self.stem = Linear(volume * self.shape[-1], dim, dtype=dtype, rngs=rngs)
        init = nnx.initializers.lecun_normal() if smooth else ZEROS
        self.head = Linear(dim, volume * channels, kernel_init=init, dtype=dtype, rngs=rngs)
        self.smooth = (
            Conv(channels, channels, rank=rank, zero=True, dtype=dtype, rngs=rngs)
            if smooth
            else None
        )

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
        [b, n, dim] after the middle block, float32."""
        check_example(x, self.shape)
        batch = x.shape[0]
        patches = self.stem(to_patches(x.astype(self.dtype), self.patch))
        patches = constrain_batch(self.layout.place(patches, self.positions))
        number = patches.shape[1]
        tokens, mask = [self._single_tokens(noise, conditioning)], None
        if self.text is not None:
            text = self.text(conditioning, batch)
            before = tokens[0].shape[1]
            mask = jnp.pad(text.mask, ((0, 0), (before, number)), constant_values=True)
            tokens.append(text.tokens)
        h, features = self._run_blocks(
            jnp.concatenate([*tokens, patches], axis=1), number, mask, key
        )
        h = self.head(self.norm(h[:, -number:]))
        h = from_patches(h, self.layout.grid, self.patch, self.out_channels)
        output = (h if self.smooth is None else self.smooth(h)).astype(jnp.float32)
        return (output, features[:, -number:].astype(jnp.float32)) if return_features else output

    def _single_tokens(
        self, noise: Float[Array, " b"], conditioning: Mapping[str, Array]
    ) -> Float[Array, "b m d"]:
        """The tokens of noise level, class and numbers, with learned positions where there are."""
        angles = noise.astype(jnp.float32) * NOISE_SCALES[self.noise_input]
        tokens = [sinusoidal(angles, self.dim).astype(self.dtype)]
        for name, part in (("label", self.label), ("scalar", self.scalar)):
            if part is not None:
                given, keep = conditioning.get(name), conditioning.get(f"{name}_keep")
                tokens.append(part(given, keep, noise.shape[0]))
        stacked = jnp.stack(tokens, axis=1)
        if self.positions is None:
            return stacked
        return stacked + self.positions[: len(tokens)].astype(self.dtype)

    def _run_blocks(
        self,
        x: Float[Array, "b n d"],
        patches: int,
        mask: Bool[Array, "b n"] | None,
        key: Key[Array, "*k"] | None,
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b n d"]]:
        """The tokens after the last block and after the one in the middle."""
        beside = x.shape[1] - patches
        angles = self.layout.angles(beside)

        def step(first: int, keep: bool) -> Any:
            def run(block: Block, x: Any, index: Any, skip: Any) -> tuple[Any, Any]:
                part = fold_key(key, first + index)
                x = block(x, part, skip=skip, mask=mask, angles=angles, beside=beside)
                return x, x if keep else None

            return run

        how: Any = {"scan": self.scan, "remat": self.remat}
        half = self.half
        if not half:
            x, _ = run_blocks(self.middle["blocks"], x, step(0, False), depth=1, **how)
            return x, x
        x, skips = run_blocks(self.down["blocks"], x, step(0, True), depth=half, **how)
        x, _ = run_blocks(self.middle["blocks"], x, step(half, False), depth=1, **how)
        middle, mirrored = x, jnp.flip(skips, axis=0)
        up = step(half + 1, False)
        x, _ = run_blocks(self.up["blocks"], x, up, depth=half, inputs=mirrored, **how)
        return x, middle
