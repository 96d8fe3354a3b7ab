"""Small parts that every network uses: dropout by key, group norm, feed-forward, sharding."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Key

BATCH_AXES = ("data", "fsdp")

ZEROS = nnx.initializers.zeros_init()


def constrain_batch(x: Array) -> Array:
    """Pins the leading axis of an activation to the data axes of the ambient mesh.

    Without it the compiler may replicate activations inside a block. It does nothing outside
    `jax.set_mesh`, inside `shard_map` over those axes, or where the batch does not divide.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if name in BATCH_AXES and kind == AxisType.Auto
    )
    if not axes or x.shape[0] % math.prod(mesh.shape[name] for name in axes):
        return x
    return jax.lax.with_sharding_constraint(x, P(axes))


def fold_key(key: Key[Array, "*b"] | None, index: int | Array) -> Key[Array, "*b"] | None:
    """The key of part `index` of a network: of a scalar key, of each of `[b]` keys, or None."""
    if key is None:
        return None
    if key.ndim:
        return jax.vmap(lambda one: jax.random.fold_in(one, index))(key)
    return jax.random.fold_in(key, index)


def dropout(x: Float[Array, "b ..."], rate: float, key: Key[Array, "*b"] | None) -> Array:
    """Zeroes entries with probability `rate`, scaling the others by 1 / (1 - rate).

    The mask is a function of the key alone: one key for the batch, or `[b]` keys, with which an
    example's mask does not depend on the batch it is in. No key, or rate 0: the identity.
    """
    if key is None or not rate:
        return x
    if key.ndim:
        keep = jax.vmap(lambda one: jax.random.bernoulli(one, 1 - rate, x.shape[1:]))(key)
    else:
        keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), jnp.zeros((), x.dtype))


class GroupNorm(nnx.Module):
    """Group normalisation (Wu & He 2018) with an optional per-example scale and shift.

    There are `groups`, or the largest smaller number that divides the channels. Statistics are
    float32.
    """

    def __init__(self, channels: int, *, groups: int = 32, epsilon: float = 1e-5, rngs: nnx.Rngs):
        self.groups = next(n for n in range(min(groups, channels), 0, -1) if channels % n == 0)
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones((channels,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((channels,), jnp.float32))

    def __call__(
        self,
        x: Float[Array, "b *space c"],
        scale: Float[Array, "b c"] | None = None,
        shift: Float[Array, "b c"] | None = None,
    ) -> Float[Array, "b *space c"]:
        """`norm(x) * (1 + scale) + shift`, channel-wise (adaptive group norm, ADM 2021)."""
        space = tuple(range(1, x.ndim - 1))
        wide = x.astype(jnp.float32)
        moments = jnp.stack([wide.mean(space), jnp.square(wide).mean(space)])
        grouped = moments.reshape(2, x.shape[0], self.groups, -1).mean(-1)
        mean, square = jnp.repeat(grouped, x.shape[-1] // self.groups, axis=-1)
        variance = jnp.maximum(square - jnp.square(mean), 0.0)
        # Statistics, affine part and conditioning meet in one multiply-add a channel, so that
        # the feature map is read twice and written once.
        gain = jax.lax.rsqrt(variance + self.epsilon) * self.scale[...]
        offset = self.bias[...] - mean * gain
        if scale is not None:
            gain, offset = gain * (1 + scale), offset * (1 + scale)
        if shift is not None:
            offset = offset + shift
        gain, offset = (jnp.expand_dims(a, space) for a in (gain, offset))
        return (wide * gain + offset).astype(x.dtype)


def matmul(x: Float[Array, "*b d"], kernel: Float[Array, "d e"]) -> Float[Array, "*b e"]:
    """`x @ kernel`, over the last axis of `x`.

    On CPU leading axes are merged first: the gradient of the kernel then contracts one axis
    instead of several, which XLA:CPU does without copying an operand (a seventh of a DiT step).
    """
    if x.ndim <= 2 or jax.default_backend() != "cpu":
        return x @ kernel
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], -1)


class Linear(nnx.Linear):
    """`nnx.Linear` by `matmul`; of its options it heeds `use_bias`, `kernel_init` and `dtype`."""

    def __call__(self, inputs: Float[Array, "*b d"]) -> Float[Array, "*b e"]:
        kernel = self.kernel[...].astype(self.dtype)
        outputs = matmul(inputs.astype(self.dtype), kernel)
        return outputs if self.bias is None else outputs + self.bias[...].astype(self.dtype)


class FeedForward(nnx.Module):
    """Two linear layers with the tanh approximation of GELU between them."""

    def __init__(self, dim: int, hidden: int, *, dtype: Any, rngs: nnx.Rngs):
        self.fc1 = Linear(dim, hidden, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(hidden, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        return self.fc2(jax.nn.gelu(self.fc1(x)))
