"""The multi-scale convolutional network of the 2015 paper, told the time in its last step alone.

Sohl-Dickstein et al. 2015, appendix D.2 and figure D.1. A layer of multi-scale convolution (D.2.1)
pools the image to scales 1, 1/2, 1/4, ..., convolves at each, brings all back to full size and sums
them, before a soft rectifier. Dense layers (D.2.2) follow, at every pixel alike, tanh between them,
beside them on demand a dense pathway over the whole image. A linear map gives J coefficients y_ij
of every output, and the readout blends them over t in [0, 1] (D.2.3):

  (1)  z_i(t) = sum_j y_ij g_j(t),     g(t) = softmax_j(-(t - tau_j)^2 / (2 w^2))

with centres tau_j evenly from 0 to 1, their distance being w. So one pass of the network serves all
times of a state, and what depends on time has J degrees of freedom. In place of the paper's own
initial weights, each scale starts with its share of the variance, and the rectifier is centred and
scaled. So layers keep the variance of maps that pooling does not shrink, smooth ones; of white
noise the coarse scales lose theirs, all but 4^-k at scale 2^-k of a picture.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from diffusion_jax.errors import ConfigError
from diffusion_jax.networks.conv import Conv, double
from diffusion_jax.networks.embeddings import LabelEmbedding
from diffusion_jax.networks.layers import ZEROS, Linear, constrain_batch, dropout, fold_key
from diffusion_jax.networks.resampling import mean_pool
from diffusion_jax.networks.text import TextConfig
from diffusion_jax.networks.validation import (
    check_common,
    check_example,
    check_not_negative,
    check_positive,
    check_spatial,
)

SECTION = "network.multiscale"
# Of log(1 + e^z) for standard normal z.
_SOFTPLUS_MEAN, _SOFTPLUS_STD = 0.806, 0.537


def soft_relu(x: Array) -> Array:
    """log(1 + e^x), with mean 0 and deviation 1 where x has them."""
    return (jax.nn.softplus(x) - _SOFTPLUS_MEAN) / _SOFTPLUS_STD


def bumps(t: Float[Array, " b"], count: int) -> Float[Array, "b count"]:
    """g(t) of (1): positive, and 1 in sum. Constant where `count` is 1."""
    centres = np.linspace(0.0, 1.0, count, dtype=np.float32)
    width = 1.0 / max(count - 1, 1)
    return jax.nn.softmax(-0.5 * ((t.astype(jnp.float32)[:, None] - centres) / width) ** 2)


class MultiScaleConv(nnx.Module):
    """A linear layer: convolutions of the image pooled by 1, 2, 4, ..., each brought back, summed.

    Away from the borders it commutes with shifts by 2^(scales - 1) pixels; the first scale alone
    with every shift.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        *,
        rank: int,
        scales: int,
        size: int,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        shared: Any = {"rank": rank, "size": size, "dtype": dtype, "rngs": rngs}
        self.scales = nnx.Dict(
            {str(i): Conv(channels, out_channels, **shared) for i in range(scales)}
        )

    def __call__(self, x: Float[Array, "b *space c"]) -> Float[Array, "b *space d"]:
        # From the coarsest on: two maps of each size, never all at full size.
        pooled = [x]
        for _ in range(len(self.scales) - 1):
            pooled.append(mean_pool(pooled[-1]))
        total = None
        for i in reversed(range(len(self.scales))):
            own = self.scales[str(i)](pooled[i])
            total = own if total is None else own + double(total)
        assert total is not None
        return total / math.sqrt(len(self.scales))


class MultiScale(nnx.Module):
    """The network of the module's description, starting from zero output.

    Args:
        shape: shape of an example, spatial axes and then channels, such as `(28, 28, 1)`.
        channels: of the multi-scale layers.
        layers: number of multi-scale layers; 0: none, the image itself goes on.
        scales: of each layer, by powers of two; the image must be divisible by the largest.
        kernel: size of the convolutions, odd.
        dense_channels: of the dense layers at every pixel.
        dense_layers: number of them before the readout.
        bumps: J of (1).
        full_width: hidden size of the dense pathway over the whole image; 0: none.
        full_channels: what that pathway gives to every pixel.
        dropout: rate before the dense layers; active when a key is given.
        num_classes: 0 for a network without classes; else the label's vector joins at every pixel.
        scalars: 0; the network reads no numbers.
        text: None; the network reads no captions.
        noise_input: "t", which the readout needs.
        out_channels: of the output; None: those of the input.
        dtype: compute dtype; parameters and output are float32.

    Raises:
        ConfigError: a size that cannot work, naming `network.multiscale.<field>`.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        channels: int = 32,
        layers: int = 3,
        scales: int = 3,
        kernel: int = 3,
        dense_channels: int = 64,
        dense_layers: int = 2,
        bumps: int = 10,
        full_width: int = 0,
        full_channels: int = 2,
        dropout: float = 0.0,
        num_classes: int = 0,
        scalars: int = 0,
        text: TextConfig | None = None,
        noise_input: str = "t",
        out_channels: int | None = None,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_spatial(SECTION, shape)
        check_not_negative(SECTION, layers=layers, full_width=full_width)
        check_positive(SECTION, channels=channels, scales=scales, bumps=bumps)
        check_positive(SECTION, dense_channels=dense_channels, dense_layers=dense_layers)
        check_positive(SECTION, full_channels=full_channels)
        dtype = check_common(SECTION, num_classes, dropout, noise_input, dtype)
        self.shape, self.noise_input, self.dtype = tuple(shape), noise_input, dtype
        self.dropout, self.bumps = dropout, bumps
        *space, own = self.shape
        _check(noise_input, space, layers, scales, kernel, scalars, text)
        self.out_channels = own if out_channels is None else out_channels
        check_positive(SECTION, out_channels=self.out_channels)
        shared: Any = {"dtype": dtype, "rngs": rngs}
        widths = [own] + [channels] * layers
        self.layers = nnx.Dict(
            {
                str(i): MultiScaleConv(a, b, rank=len(space), scales=scales, size=kernel, **shared)
                for i, (a, b) in enumerate(itertools.pairwise(widths))
            }
        )
        width, pixels = widths[-1], math.prod(space)
        sizes = [pixels * own, full_width, full_width, pixels * full_channels]
        self.full = _stack(sizes, shared) if full_width else None
        width += full_channels if full_width else 0
        self.label = (
            LabelEmbedding(num_classes, width, stddev=1.0, **shared) if num_classes else None
        )
        self.dense = _stack([width] + [dense_channels] * dense_layers, shared)
        self.head = Linear(
            dense_channels, self.out_channels * bumps, kernel_init=ZEROS, dtype=dtype, rngs=rngs
        )

    def __call__(
        self,
        x: Float[Array, "b ..."],
        noise: Float[Array, " b"],
        conditioning: Mapping[str, Array],
        *,
        key: Key[Array, "*k"] | None = None,
    ) -> Float[Array, "b ..."]:
        check_example(x, self.shape)
        h = image = x.astype(self.dtype)
        for i in range(len(self.layers)):
            h = constrain_batch(soft_relu(self.layers[str(i)](h)))
        if self.full is not None:
            seen = _tanh_layers(self.full, image.reshape(len(x), -1))
            h = jnp.concatenate([h, seen.reshape(*x.shape[:-1], -1)], axis=-1)
        if self.label is not None:
            label, keep = conditioning.get("label"), conditioning.get("label_keep")
            given = self.label(label, keep, len(x))
            h = h + given.reshape(len(x), *(1,) * (x.ndim - 2), -1)
        h = _tanh_layers(self.dense, dropout(h, self.dropout, fold_key(key, 0)))
        coefficients = self.head(h).astype(jnp.float32)
        coefficients = coefficients.reshape(*x.shape[:-1], self.out_channels, self.bumps)
        return jnp.einsum("b...j,bj->b...", coefficients, bumps(noise, self.bumps))


def _check(
    noise_input: str,
    space: Sequence[int],
    layers: int,
    scales: int,
    kernel: int,
    scalars: int,
    text: TextConfig | None,
) -> None:
    if noise_input != "t":
        raise ConfigError(
            f"network.noise_input={noise_input!r}: the readout of network.multiscale blends over "
            "time; expected 't'"
        )
    if kernel < 1 or kernel % 2 == 0:
        raise ConfigError(f"{SECTION}.kernel={kernel}: expected an odd size, such as 3")
    if layers and any(size % 2 ** (scales - 1) for size in space):
        whole = math.gcd(*space)
        most = 1 + ((whole & -whole).bit_length() - 1)
        raise ConfigError(
            f"{SECTION}.scales={scales}: {'x'.join(map(str, space))} cannot be halved "
            f"{scales - 1} times; nearest: {most}"
        )
    if scalars or text is not None:
        what = "numbers" if scalars else "captions"
        raise ConfigError(
            f"network.name='multiscale': it reads no {what}; expected another network, or data "
            "without"
        )


def _stack(sizes: Sequence[int], shared: Any) -> Any:
    pairs = itertools.pairwise(sizes)
    return nnx.Dict({str(i): Linear(a, b, **shared) for i, (a, b) in enumerate(pairs)})


def _tanh_layers(stack: Any, h: Array) -> Array:
    for i in range(len(stack)):
        h = jnp.tanh(stack[str(i)](h))
    return h
