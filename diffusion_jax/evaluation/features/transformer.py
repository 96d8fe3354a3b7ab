"""The transformer that DINOv2 and CLIP share: blocks with the norm first, in single precision.

Parameters are nested dicts: a norm is {scale, bias}, a linear layer {kernel [in, out], bias}, a
stack of blocks one dict whose arrays have a leading axis for the depth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion_jax.networks.attention import attend
from diffusion_jax.networks.layers import matmul

Params = Mapping[str, Any]


def gelu(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """x Phi(x) (Hendrycks & Gimpel 2016), without approximation."""
    return jax.nn.gelu(x, approximate=False)


def quick_gelu(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """x sigmoid(1.702 x), the approximation that CLIP was trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"gelu": gelu, "quick_gelu": quick_gelu}


def linear(layer: Params, x: Float[Array, "*b d"]) -> Float[Array, "*b e"]:
    """x kernel + bias, where it has one."""
    y = matmul(x, layer["kernel"])
    return y + layer["bias"] if "bias" in layer else y


def layer_norm(norm: Params, x: Float[Array, "*b d"], epsilon: float) -> Float[Array, "*b d"]:
    """Layer normalisation (Ba et al. 2016) over the last axis."""
    centred = x - x.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + epsilon) * norm["scale"] + norm["bias"]


def patches(
    images: Float[Array, "b h w c"], kernel: Float[Array, "p p c d"]
) -> Float[Array, "b n d"]:
    """A convolution whose stride is its size; patches row by row. Sizes must divide."""
    b, h, w, c = images.shape
    p = kernel.shape[0]
    cells = images.reshape(b, h // p, p, w // p, p, c).swapaxes(2, 3)
    return matmul(cells.reshape(b, -1, p * p * c), kernel.reshape(p * p * c, -1))


def blocks(
    stack: Params,
    x: Float[Array, "b n d"],
    *,
    heads: int,
    activation: str,
    epsilon: float,
    causal: bool = False,
) -> Float[Array, "b n d"]:
    """All blocks of a stack, one after the other, as one scanned program.

    A block is x + s1 attention(norm1 x), then x + s2 mlp(norm2 x), where s1, s2 are `scale1`,
    `scale2` (LayerScale, Touvron et al. 2021) or one. The kernel of `qkv` has queries, keys, values
    beside each other; that of `gates` has gate and value of a SwiGLU (Shazeer 2020).

    Args:
        stack: dicts norm1, qkv, out, norm2, and fc1 and fc2 or gates and fc2.
        heads: of the attention.
        activation: one of `ACTIVATIONS`, where there is no gate.
        epsilon: of the norms.
        causal: attend to no later token.
    """

    def block(x: Array, one: Params) -> tuple[Array, None]:
        y = _attention(one, layer_norm(one["norm1"], x, epsilon), heads, causal)
        x = x + y * one.get("scale1", 1.0)
        y = layer_norm(one["norm2"], x, epsilon)
        if "gates" in one:
            gate, value = jnp.split(linear(one["gates"], y), 2, axis=-1)
            y = jax.nn.silu(gate) * value
        else:
            y = ACTIVATIONS[activation](linear(one["fc1"], y))
        return x + linear(one["fc2"], y) * one.get("scale2", 1.0), None

    return jax.lax.scan(block, x, stack)[0]


def _attention(one: Params, x: Array, heads: int, causal: bool) -> Array:
    b, n, d = x.shape
    q, k, v = jnp.moveaxis(linear(one["qkv"], x).reshape(b, n, 3, heads, d // heads), 2, 0)
    if causal:
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")
    else:
        y = attend(q, k, v, "auto")
    return linear(one["out"], y.reshape(b, n, d))


def on_device(params: Params) -> Any:
    """The same tree; arrays of NumPy, as read from a file, as those of JAX."""
    return jax.tree.map(jnp.asarray, params)


def normalise(
    images: Any, mean: Sequence[float], deviation: Sequence[float]
) -> Float[Array, "b h w 3"]:
    """8-bit pictures as (x / 255 - mean) / deviation, channel by channel."""
    scaled = images.astype(jnp.float32) / 255.0
    return (scaled - np.asarray(mean, np.float32)) / np.asarray(deviation, np.float32)


def unit_length(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """Vectors divided by their Euclidean norm."""
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def stacked(parts: Sequence[Params]) -> Params:
    """The dicts of single blocks as that of a stack."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *parts)
