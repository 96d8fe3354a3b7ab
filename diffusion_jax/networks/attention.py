"""Multi-head self-attention over tokens."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from diffusion_jax.networks.layers import ZEROS, Linear

ATTENTIONS = ("auto", "xla", "cudnn")


class SelfAttention(nnx.Module):
    """Self-attention; `dim` is split into `heads`.

    The fused projection is laid out (heads, 3, head size): splitting its last axis over devices
    splits whole heads.

    Args:
        implementation: `auto` and `xla` run everywhere; `cudnn` is a fused kernel for GPU in
            bfloat16 or float16.
        zero: start the output projection from zero.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        implementation: str = "auto",
        zero: bool = False,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.heads, self.implementation = heads, implementation
        self.qkv = Linear(dim, 3 * dim, dtype=dtype, rngs=rngs)
        init = ZEROS if zero else nnx.initializers.lecun_normal()
        self.out = Linear(dim, dim, kernel_init=init, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        b, n, d = x.shape
        q, k, v = jnp.moveaxis(self.qkv(x).reshape(b, n, self.heads, 3, d // self.heads), 3, 0)
        return self.out(attend(q, k, v, self.implementation).reshape(b, n, d))


def attend(
    q: Float[Array, "b n h e"],
    k: Float[Array, "b m h e"],
    v: Float[Array, "b m h e"],
    implementation: str = "auto",
) -> Float[Array, "b n h e"]:
    """softmax(q k^T / sqrt(e)) v, with a float32 softmax (Vaswani et al. 2017, eq. 1)."""
    if implementation == "auto" and jax.default_backend() == "cpu":
        return _attend_by_heads(q, k, v)
    backend = None if implementation == "auto" else implementation
    return jax.nn.dot_product_attention(q, k, v, implementation=backend)  # pyright: ignore


def _attend_by_heads(q: Array, k: Array, v: Array) -> Array:
    """The same, arranged for XLA:CPU: 2.6 times as fast forward, 1.6 times with gradients.

    Heads stand before tokens, so that both products are plain batched dots, and the division of
    the softmax is made on the small result.
    """
    q, k, v = (a.swapaxes(1, 2) for a in (q * q.shape[-1] ** -0.5, k, v))
    scores = jnp.einsum("bhne,bhme->bhnm", q, k, preferred_element_type=jnp.float32)
    highest = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.exp(scores - highest)
    total = weights.sum(-1, keepdims=True)
    out = jnp.einsum("bhnm,bhme->bhne", weights.astype(v.dtype), v)
    return (out / total).astype(v.dtype).swapaxes(1, 2)
