"""Conditioning vectors: noise level, class label and numbers with their nulls, fixed positions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from diffusion_jax.networks.layers import Linear

# Radians per unit of the noise input at the highest frequency, so that the usual range of each
# input (1000 steps, t in [0, 1], 40 units of logsnr; c_noise = -logsnr / 8) spans 1000 radians.
NOISE_SCALES = {"timestep": 1.0, "t": 1000.0, "logsnr": 25.0, "c_noise": 200.0}

SCALAR_FEATURES = 128
"""Sinusoids of each of an example's numbers."""


def sinusoidal(
    position: Float[Array, " b"], dim: int, *, max_period: float = 1e4
) -> Float[Array, "b dim"]:
    """Cosines, then sines, of `position` at dim/2 frequencies from 1 down to 1/max_period.

    Transformer positions (Vaswani et al. 2017) as DDPM uses them for time. `dim` must be even.
    """
    half = dim // 2
    frequencies = np.exp(-math.log(max_period) * np.arange(half) / half).astype(np.float32)
    angles = position.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def sincos_positions(grid: Sequence[int], dim: int) -> Float[np.ndarray, "n dim"]:
    """Fixed position embedding of a grid (MAE 2022, DiT 2023): an equal share of `dim` an axis.

    Rows follow the grid in C order. `dim` must be divisible by twice the rank of the grid.
    """
    share = dim // len(grid)
    frequencies = 1e4 ** (-np.arange(share // 2) / (share // 2))
    coordinates = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1)
    angles = coordinates.reshape(-1, len(grid), 1) * frequencies
    table = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
    return table.reshape(-1, dim).astype(np.float32)


def fourier_waves(features: int) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies in radians, spread like a normal variable times 2 pi, and phases, spread evenly.

    Quantiles instead of draws (both as even as their number allows): a network holds parameters
    alone, and these are none.
    """
    ranks = (np.arange(features) + 0.5) / features
    frequencies = 2 * np.pi * np.array([NormalDist().inv_cdf(float(rank)) for rank in ranks])
    golden = (math.sqrt(5) - 1) / 2
    phases = 2 * np.pi * (np.arange(features) * golden % 1.0)
    return frequencies.astype(np.float32), phases.astype(np.float32)


def as_c_noise(noise: Float[Array, " b"], noise_input: str) -> Float[Array, " b"]:
    """The noise input stretched to the range of EDM's `c_noise` = ln(sigma) / 4, float32."""
    return noise.astype(jnp.float32) * (NOISE_SCALES[noise_input] / NOISE_SCALES["c_noise"])


def fourier(level: Float[Array, " b"], dim: int, *, scale: float = 16.0) -> Float[Array, "b dim"]:
    """Cosines, then sines, of `level` at dim/2 frequencies of a normal spread of `scale` turns a
    unit (Tancik et al. 2020, as NCSN++ uses them for noise). `dim` must be even."""
    frequencies, _ = fourier_waves(dim // 2)
    angles = level[:, None] * (scale * frequencies)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


NOISE_EMBEDDINGS = ("positional", "fourier")


class NoiseEmbedding(nnx.Module):
    """Sinusoids of the noise input (one of `NOISE_EMBEDDINGS`), then linear, SiLU, linear."""

    def __init__(
        self,
        noise_input: str,
        features: int,
        dim: int,
        *,
        kind: str = "positional",
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.noise_input, self.features, self.kind = noise_input, features, kind
        self.fc1 = Linear(features, dim, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(dim, dim, dtype=dtype, rngs=rngs)

    def __call__(self, noise: Float[Array, " b"]) -> Float[Array, "b d"]:
        # The angles reach 1000 radians: they need float32 whatever the compute dtype is.
        if self.kind == "fourier":
            waves = fourier(as_c_noise(noise, self.noise_input), self.features)
        else:
            angles = noise.astype(jnp.float32) * NOISE_SCALES[self.noise_input]
            waves = sinusoidal(angles, self.features)
        return self.fc2(jax.nn.silu(self.fc1(waves)))


class LabelEmbedding(nnx.Module):
    """A vector a class, and one of its own for "no class" (classifier-free guidance, 2022)."""

    def __init__(self, num_classes: int, dim: int, *, stddev: float, dtype: Any, rngs: nnx.Rngs):
        self.dtype = dtype
        normal = nnx.initializers.normal(stddev)
        self.table = nnx.Param(normal(rngs.params(), (num_classes, dim), jnp.float32))
        self.null = nnx.Param(normal(rngs.params(), (dim,), jnp.float32))

    def __call__(
        self, label: Int[Array, " b"] | None, keep: Bool[Array, " b"] | None, batch: int
    ) -> Float[Array, "b d"]:
        """The label's vector where it is kept, else the null; no label at all: the null.

        A label out of range gives NaN where it is kept, never another class's vector.
        """
        null = jnp.broadcast_to(self.null[...], (batch, *self.null.shape)).astype(self.dtype)
        if label is None:
            return null
        kept = (
            self.table[...]
            .at[label]
            .get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        )
        kept = kept.astype(self.dtype)
        return kept if keep is None else jnp.where(keep[:, None], kept, null)


class ScalarEmbedding(nnx.Module):
    """Numbers of an example, such as its size or an aesthetic score, with a null for "not given".

    Sinusoids of each number, then linear, SiLU, linear. Frequencies go from 100 radians a unit down
    to 1e-4, so that numbers of any ordinary unit are told apart.
    """

    def __init__(self, scalars: int, dim: int, *, stddev: float, dtype: Any, rngs: nnx.Rngs):
        self.scalars, self.dtype = scalars, dtype
        self.fc1 = Linear(scalars * SCALAR_FEATURES, dim, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(dim, dim, dtype=dtype, rngs=rngs)
        normal = nnx.initializers.normal(stddev)
        self.null = nnx.Param(normal(rngs.params(), (dim,), jnp.float32))

    def __call__(
        self, scalar: Float[Array, "b k"] | None, keep: Bool[Array, " b"] | None, batch: int
    ) -> Float[Array, "b d"]:
        """The numbers' vector where it is kept, else the null; no numbers at all: the null.

        Raises:
            ValueError: there are more or fewer numbers than the network was built for.
        """
        null = jnp.broadcast_to(self.null[...], (batch, *self.null.shape)).astype(self.dtype)
        if scalar is None:
            return null
        if scalar.shape[1] != self.scalars:
            raise ValueError(f"scalar has shape {scalar.shape}; expected ({batch}, {self.scalars})")
        angles = 100.0 * scalar.astype(jnp.float32)
        features = sinusoidal(angles.reshape(-1), SCALAR_FEATURES, max_period=1e6)
        kept = self.fc2(jax.nn.silu(self.fc1(features.reshape(batch, -1))))
        return kept if keep is None else jnp.where(keep[:, None], kept, null)


class ConditionEmbedding(nnx.Module):
    """The sum of the embeddings of noise and, where the network has them, class, numbers and text.

    Reads of the conditioning, all optional: `label` (int `[b]`), `scalar` (float `[b, k]`), and
    `label_keep`, `scalar_keep` (bool `[b]`, absent: keep all). What is not there is the null.

    Args:
        noise_input: unit of the noise, a key of `NOISE_SCALES`.
        features: sinusoids of the noise, an even number.
        dim: size of the sum.
        num_classes: 0 for a network without classes.
        scalars: how many numbers describe an example, 0 for none.
        stddev: of the tables and nulls at the start.
        kind: sinusoids of the noise, one of `NOISE_EMBEDDINGS`.
    """

    def __init__(
        self,
        noise_input: str,
        features: int,
        dim: int,
        num_classes: int,
        *,
        scalars: int = 0,
        stddev: float,
        kind: str = "positional",
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.noise = NoiseEmbedding(noise_input, features, dim, kind=kind, dtype=dtype, rngs=rngs)
        shared: Any = {"stddev": stddev, "dtype": dtype, "rngs": rngs}
        self.label = LabelEmbedding(num_classes, dim, **shared) if num_classes else None
        self.scalar = ScalarEmbedding(scalars, dim, **shared) if scalars else None

    def __call__(
        self,
        noise: Float[Array, " b"],
        conditioning: Mapping[str, Array],
        pooled: Float[Array, "b d"] | None = None,
    ) -> Float[Array, "b d"]:
        """The sum; `pooled` is the text's vector, from `TextConditioning`."""
        embedding, batch = self.noise(noise), noise.shape[0]
        for name, part in (("label", self.label), ("scalar", self.scalar)):
            if part is not None:
                given, keep = conditioning.get(name), conditioning.get(f"{name}_keep")
                embedding = embedding + part(given, keep, batch)
        return embedding if pooled is None else embedding + pooled
