"""Multi-head attention over tokens: among themselves, or to those of a text."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from diffusion_jax.errors import ConfigError
from diffusion_jax.networks.layers import ZEROS, Linear
from diffusion_jax.networks.positions import rotate

ATTENTIONS = ("auto", "xla", "cudnn", "identity")
"""`identity`: self-attention whose map is the identity, for perturbed-attention guidance (Ahn et
al. 2024); see `attend_alone`. Attention to a text stays."""

# Largest head of cuDNN's fused kernel (256 from Hopper on, 128 before).
_CUDNN_HEAD = 256


class SelfAttention(nnx.Module):
    """Self-attention; `dim` is split into `heads`.

    The fused projection is laid out (heads, 3, head size): splitting its last axis over devices
    splits whole heads.

    Args:
        qk_norm: normalise queries and keys of each head by their root mean square, with a learned
            scale, which bounds the logits (Henry et al. 2020; Dehghani et al. 2023).
        bias: whether the fused projection has a bias.
        implementation: `auto` and `xla` run everywhere; `cudnn` is a fused kernel for GPU in
            bfloat16 or float16; `identity` lets each token attend to itself alone.
        zero: start the output projection from zero.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        qk_norm: bool = False,
        bias: bool = True,
        implementation: str = "auto",
        zero: bool = False,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.heads, self.implementation = heads, implementation
        self.qkv = Linear(dim, 3 * dim, use_bias=bias, dtype=dtype, rngs=rngs)
        self.q_norm, self.k_norm = _head_norms(qk_norm, dim // heads, dtype, rngs)
        init = ZEROS if zero else nnx.initializers.lecun_normal()
        self.out = Linear(dim, dim, kernel_init=init, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b n d"],
        *,
        mask: Bool[Array, "b n"] | None = None,
        angles: Float[np.ndarray, "n pairs"] | None = None,
        beside: int = 0,
    ) -> Float[Array, "b n d"]:
        """Attends to the tokens that `mask` allows (None: all); `angles` as of `axial_angles`.

        The first `beside` tokens are no patches: `identity` leaves the attention from and to them.
        """
        b, n, d = x.shape
        q, k, v = jnp.moveaxis(self.qkv(x).reshape(b, n, self.heads, 3, d // self.heads), 3, 0)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        if self.implementation == "identity":
            return self.out(attend_alone(q, k, v, beside, mask=mask).reshape(b, n, d))
        return self.out(attend(q, k, v, self.implementation, mask=mask).reshape(b, n, d))


class CrossAttention(nnx.Module):
    """Attention of tokens of width `dim` to a context of width `context_dim`.

    The fused projection of the context is laid out (heads, 2, head size). The output projection
    starts from zero, so that a block with it begins as the block without.

    Args:
        dim: width of the tokens, split into `heads`.
        context_dim: width of the context.
        qk_norm, implementation: as of `SelfAttention`.
    """

    def __init__(
        self,
        dim: int,
        context_dim: int,
        heads: int,
        *,
        qk_norm: bool = False,
        implementation: str = "auto",
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.heads, self.implementation = heads, implementation
        self.q = Linear(dim, dim, dtype=dtype, rngs=rngs)
        self.kv = Linear(context_dim, 2 * dim, dtype=dtype, rngs=rngs)
        self.q_norm, self.k_norm = _head_norms(qk_norm, dim // heads, dtype, rngs)
        self.out = Linear(dim, dim, kernel_init=ZEROS, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b n d"],
        context: Float[Array, "b m c"],
        mask: Bool[Array, "b m"] | None = None,
    ) -> Float[Array, "b n d"]:
        """Attends to the tokens of the context that `mask` allows (None: all)."""
        b, n, d = x.shape
        q = self.q(x).reshape(b, n, self.heads, -1)
        k, v = jnp.moveaxis(self.kv(context).reshape(b, -1, self.heads, 2, d // self.heads), 3, 0)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return self.out(attend(q, k, v, self.implementation, mask=mask).reshape(b, n, d))


def _head_norms(
    wanted: bool, size: int, dtype: Any, rngs: nnx.Rngs
) -> tuple[nnx.RMSNorm | None, nnx.RMSNorm | None]:
    if not wanted:
        return None, None
    return nnx.RMSNorm(size, dtype=dtype, rngs=rngs), nnx.RMSNorm(size, dtype=dtype, rngs=rngs)


def attend(
    q: Float[Array, "b n h e"],
    k: Float[Array, "b m h e"],
    v: Float[Array, "b m h e"],
    implementation: str = "auto",
    *,
    mask: Bool[Array, "b m"] | None = None,
) -> Float[Array, "b n h e"]:
    """softmax(q k^T / sqrt(e)) v, with a float32 softmax (Vaswani et al. 2017, eq. 1).

    Args:
        implementation: one of `ATTENTIONS`. `cudnn` is for attention without a mask: the padded
            text of a masked one is short, and goes through `xla`.
        mask: False for keys to leave out; a row without any True gives the mean of all values.

    Raises:
        ConfigError: `cudnn` where there is no NVIDIA GPU.
    """
    backend = jax.default_backend()
    if implementation == "cudnn" and backend not in ("gpu", "cuda"):
        raise ConfigError(
            f"attention=cudnn needs an NVIDIA GPU, but this process runs on {backend}; "
            "set attention=auto"
        )
    if implementation in ("auto", "identity") and backend == "cpu":
        return _attend_by_heads(q, k, v, mask)
    chosen: Any = "cudnn" if implementation == "cudnn" and mask is None else "xla"
    wide = None if mask is None else mask[:, None, None]
    return jax.nn.dot_product_attention(q, k, v, mask=wide, implementation=chosen)


def attend_alone(
    q: Float[Array, "b n h e"],
    k: Float[Array, "b n h e"],
    v: Float[Array, "b n h e"],
    beside: int = 0,
    *,
    mask: Bool[Array, "b n"] | None = None,
) -> Float[Array, "b n h e"]:
    """`attend` with the identity in place of the map among all but the first `beside` tokens.

    Without tokens beside it is v (Ahn et al. 2024, eq. 13). Else each patch attends to itself and
    to those, which carry the noise level or a text, and they to all.
    """
    if not beside:
        return v
    index = jnp.arange(q.shape[1])
    first = index < beside
    allowed = first[:, None] | first | (index[:, None] == index)
    wide = allowed[None, None] if mask is None else allowed & mask[:, None, None]
    return jax.nn.dot_product_attention(q, k, v, mask=wide, implementation="xla")


def _attend_by_heads(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """The same, arranged for XLA:CPU: 2.6 times as fast forward, 1.6 times with gradients.

    Heads stand before tokens, so that both products are plain batched dots, and the division of
    the softmax is made on the small result.
    """
    q, k, v = (a.swapaxes(1, 2) for a in (q * q.shape[-1] ** -0.5, k, v))
    scores = jnp.einsum("bhne,bhme->bhnm", q, k, preferred_element_type=jnp.float32)
    if mask is not None:
        # Finite, so that a row without any key has no NaN in it, nor in its gradient.
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    highest = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.exp(scores - highest)
    total = weights.sum(-1, keepdims=True)
    out = jnp.einsum("bhnm,bhme->bhne", weights.astype(v.dtype), v)
    return (out / total).astype(v.dtype).swapaxes(1, 2)


def check_attention(field: str, implementation: str, head_dim: int, dtype: jnp.dtype) -> None:
    """Raises ConfigError where `cudnn` is asked for types or heads that it does not take."""
    if implementation != "cudnn":
        return
    if dtype not in (jnp.bfloat16, jnp.float16):
        raise ConfigError(
            f"{field}=cudnn takes bfloat16 or float16, but the compute dtype is {dtype}; "
            f"set {field}=auto or compute_dtype=bfloat16"
        )
    if head_dim % 8 or head_dim > _CUDNN_HEAD:
        raise ConfigError(
            f"{field}=cudnn takes heads of a multiple of 8 up to {_CUDNN_HEAD} entries, not "
            f"{head_dim}; change the number of heads, or set {field}=auto"
        )
