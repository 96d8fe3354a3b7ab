"""Alignment of a network's features with those of a frozen encoder of clean data (REPA).

    loss = - mean over tokens of cos( projection(h_n), y_n ),    y = encoder(x0)           (1)

with h the tokens of an inner block of the denoiser at the noisy input and a projection of three
layers that is trained along (Yu et al. 2025, arXiv:2410.06940).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from diffusion_jax.errors import ConfigError

PyTree = Any
LAYERS = ("fc1", "fc2", "fc3")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alignment:
    """The term (1) with its projection.

    Attributes:
        encode: `(frozen tree, x0 [B, ...]) -> [B, tokens, d]`, or a grid of tokens; any encoder.
        feature_dim: channels of the network's features.
        target_dim: d, channels of the encoder's.
        hidden: width of the projection's two inner layers.
        weight: factor on (1) in the loss.
        frozen: name of the encoder's tree in `Context.frozen`.
    """

    encode: Callable[[PyTree, Array], Array]
    feature_dim: int
    target_dim: int
    hidden: int = 2048
    weight: float = 0.5
    frozen: str = "alignment"

    def init(self, key: Key[Array, ""]) -> dict[str, dict[str, Array]]:
        """Parameters of the projection: normal with variance 1 / inputs, no bias at first."""
        sizes = (self.feature_dim, self.hidden, self.hidden, self.target_dim)
        params = {}
        for number, name in enumerate(LAYERS):
            shape = sizes[number : number + 2]
            normal = jax.random.normal(jax.random.fold_in(key, number), shape)
            params[name] = {
                "kernel": normal / math.sqrt(shape[0]),
                "bias": jnp.zeros((shape[1],)),
            }
        return params

    def __call__(
        self, params: PyTree, features: Array, frozen: Mapping[str, PyTree], x0: Array
    ) -> Float[Array, " batch"]:
        """(1) of each example [B], in [-1, 1].

        Args:
            params: as from `init`.
            features: [B, ..., feature_dim], tokens or a grid of them.
            frozen: `Context.frozen`.
            x0: [B, ...], clean data.

        Raises:
            ConfigError: widths differ from those declared, or the token counts differ and are not
                both square grids.
        """
        targets = _tokens(jax.lax.stop_gradient(self.encode(frozen[self.frozen], x0)))
        features = _tokens(features)
        for field, array in (("feature_dim", features), ("target_dim", targets)):
            if array.shape[-1] != getattr(self, field):
                raise ConfigError(
                    f"alignment.{field}={getattr(self, field)}: there are {array.shape[-1]} "
                    "channels; set that"
                )
        targets = _resized(targets, features.shape[1])
        hidden = features
        for name in LAYERS:
            hidden = hidden @ params[name]["kernel"] + params[name]["bias"]
            hidden = hidden if name == LAYERS[-1] else jax.nn.silu(hidden)
        return -jnp.mean(_cosine(hidden, targets), axis=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrozenEncoder:
    """Any encoder of clean data, with its parameters; these are never trained.

    Attributes:
        encode: `(params, x0 [B, ...]) -> [B, tokens, dim]`, or a grid of tokens; pure.
        params: its parameters, nested dicts of arrays.
        dim: channels of its features.
    """

    encode: Callable[[PyTree, Array], Array]
    params: PyTree
    dim: int


def network_encoder(
    apply: Callable[..., Any], noise: float | Float[Array, ""]
) -> Callable[[PyTree, Float[Array, "batch ..."]], Array]:
    """The features of a trained denoiser, unconditional, as an encoder.

    Args:
        apply: `(params, x, noise, conditioning, *, return_features=True) -> (output, features)`.
        noise: the noise input at which it looks at clean data, in its own unit.
    """

    def encode(params: PyTree, x0: Array) -> Array:
        level = jnp.full(x0.shape[:1], noise, jnp.float32)
        return apply(params, x0, level, {}, return_features=True)[1]

    return encode


def _tokens(array: Array) -> Array:
    """[B, ..., d] -> float32 [B, tokens, d]; a single vector is a single token."""
    return array.reshape(array.shape[0], -1, array.shape[-1]).astype(jnp.float32)


def _resized(tokens: Array, count: int) -> Array:
    """A square grid of tokens averaged or interpolated to another one of `count` tokens."""
    if tokens.shape[1] == count:
        return tokens
    old, new = math.isqrt(tokens.shape[1]), math.isqrt(count)
    if old * old != tokens.shape[1] or new * new != count:
        raise ConfigError(
            f"alignment: the network has {count} tokens and the encoder {tokens.shape[1]}; "
            "expected as many, or square grids of both"
        )
    batch, _, dim = tokens.shape
    grid = jax.image.resize(tokens.reshape(batch, old, old, dim), (batch, new, new, dim), "linear")
    return grid.reshape(batch, count, dim)


def _cosine(a: Array, b: Array) -> Array:
    product = jnp.sum(a * b, axis=-1)
    squares = jnp.sum(jnp.square(a), axis=-1) * jnp.sum(jnp.square(b), axis=-1)
    return product * jax.lax.rsqrt(jnp.maximum(squares, 1e-12))
