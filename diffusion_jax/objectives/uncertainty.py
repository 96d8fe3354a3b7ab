"""Learned uncertainty weighting: every noise level gets the weight that its loss deserves.

    L(theta, u) = E_noise [ exp(-u(noise)) loss(noise) + u(noise) ]                        (1)

(Karras et al. 2024, arXiv:2312.02696, eq. 14-16; Kendall et al. 2018). For a fixed network the
best u is the logarithm of the mean loss at that noise level, so that all levels come to weigh the
same in the gradient, whatever the schedule of noise levels and its weighting.

u is a layer over Fourier features of the noise level, as in the paper; the frequencies are fixed
numbers, here the quantiles of the normal distribution in place of draws from it. It starts at 0,
where (1) is the plain loss.
"""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

PyTree = Any
GOLDEN = 0.6180339887498949


@dataclasses.dataclass(frozen=True, kw_only=True)
class Uncertainty:
    """u(noise), trained with the network and used in training only.

    Attributes:
        channels: Fourier features.
    """

    channels: int = 128

    def init(self, key: Key[Array, ""]) -> dict[str, Array]:
        """Parameters of u = 0 at every noise level."""
        return {"kernel": jnp.zeros((self.channels, 1)), "bias": jnp.zeros((1,))}

    def __call__(self, params: PyTree, logsnr: Float[Array, " batch"]) -> Float[Array, " batch"]:
        """u [B], the logarithm of the loss that is expected at a noise level.

        Args:
            params: as from `init`.
            logsnr: [B], finite; nats.
        """
        count = np.arange(self.channels)
        quantile = statistics.NormalDist().inv_cdf
        frequencies = [2.0 * np.pi * quantile((k + 0.5) / self.channels) for k in count]
        phases = 2.0 * np.pi * np.mod(count * GOLDEN, 1.0)
        # c_noise = log(sigma / alpha) / 4, the input that the frequencies are made for.
        angles = -0.125 * logsnr[:, None] * jnp.asarray(frequencies, jnp.float32)
        features = np.sqrt(2.0) * jnp.cos(angles + jnp.asarray(phases, jnp.float32))
        return (features @ params["kernel"])[:, 0] / np.sqrt(self.channels) + params["bias"][0]
