"""Residual perceptron for vectors: 2-D points, bit sequences, any small fixed shape."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from diffusion_jax.networks.embeddings import ConditionEmbedding
from diffusion_jax.networks.layers import ZEROS, Linear, constrain_batch, dropout, fold_key
from diffusion_jax.networks.text import TextConditioning, TextConfig
from diffusion_jax.networks.validation import (
    check_common,
    check_even,
    check_example,
    check_positive,
)


class MLPBlock(nnx.Module):
    """Adaptive layer norm, linear, SiLU, linear from zero, added to the input."""

    def __init__(self, width: int, *, expansion: int, dropout: float, dtype: Any, rngs: nnx.Rngs):
        self.dropout = dropout
        self.norm = nnx.LayerNorm(width, use_bias=False, use_scale=False, dtype=dtype, rngs=rngs)
        self.ada = Linear(width, 2 * width, dtype=dtype, rngs=rngs)
        self.fc1 = Linear(width, expansion * width, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(expansion * width, width, kernel_init=ZEROS, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b w"], condition: Float[Array, "b w"], key: Key[Array, "*k"] | None
    ) -> Float[Array, "b w"]:
        shift, scale = jnp.split(self.ada(condition), 2, axis=-1)
        h = self.fc1(self.norm(x) * (1 + scale) + shift)
        return x + self.fc2(dropout(jax.nn.silu(h), self.dropout, key))


class MLP(nnx.Module):
    """Perceptron over the flattened example, told the noise level and the class in every block.

    Args:
        shape: shape of an example, such as `(2,)` or `(20,)`; the output has the same shape
            (for bits: one logit a bit).
        width: size of the residual stream, an even number.
        depth: number of residual blocks.
        expansion: hidden size of a block over `width`.
        dropout: rate inside the blocks; active when a key is given.
        num_classes: 0 for a network without classes.
        scalars: how many numbers describe an example (`scalar` of the conditioning); 0: none.
        text: how captions are read, pooled to a vector; None: the network takes none.
        noise_input: unit of the noise argument (`logsnr`, `t`, `c_noise`, `timestep`).
        outputs: numbers put out for each of an example; the last axis of the output is this many
            times longer.
        dtype: compute dtype; parameters and output are float32.

    Raises:
        ConfigError: a size that cannot work, naming `network.mlp.<field>`.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        width: int = 128,
        depth: int = 3,
        expansion: int = 2,
        dropout: float = 0.0,
        num_classes: int = 0,
        scalars: int = 0,
        text: TextConfig | None = None,
        noise_input: str = "logsnr",
        outputs: int = 1,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_positive("network.mlp", width=width, depth=depth, expansion=expansion)
        check_positive("network.mlp", outputs=outputs)
        check_even("network.mlp.width", width)
        dtype = check_common(
            "network.mlp", num_classes, dropout, noise_input, dtype, scalars=scalars
        )
        self.shape, self.noise_input, self.dtype = tuple(shape), noise_input, dtype
        size = math.prod(self.shape)
        self.stem = Linear(size, width, dtype=dtype, rngs=rngs)
        shared: Any = {"stddev": 1.0, "dtype": dtype, "rngs": rngs}
        self.condition = ConditionEmbedding(
            noise_input, width, width, num_classes, scalars=scalars, **shared
        )
        self.text = TextConditioning(text, pooled_dim=width, **shared) if text else None
        self.layers = nnx.Dict(
            {
                str(i): MLPBlock(
                    width, expansion=expansion, dropout=dropout, dtype=dtype, rngs=rngs
                )
                for i in range(depth)
            }
        )
        self.norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.outputs = outputs
        self.head = Linear(width, outputs * size, kernel_init=ZEROS, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b ..."],
        noise: Float[Array, " b"],
        conditioning: Mapping[str, Array],
        *,
        key: Key[Array, "*k"] | None = None,
    ) -> Float[Array, "b ..."]:
        check_example(x, self.shape)
        pooled = None if self.text is None else self.text(conditioning, x.shape[0]).pooled
        condition = jax.nn.silu(self.condition(noise, conditioning, pooled))
        h = self.stem(x.reshape(x.shape[0], -1).astype(self.dtype))
        for i in range(len(self.layers)):
            h = constrain_batch(self.layers[str(i)](h, condition, fold_key(key, i)))
        output = self.head(self.norm(h)).astype(jnp.float32)
        return output.reshape(*x.shape[:-1], self.outputs * x.shape[-1])
