"""Distances of feature distributions by a kernel: KID and CMMD, both without bias.

    MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y),    x, x' of one set and y, y' of the other

with different examples in each pair (Gretton et al. 2012, lemma 6).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float

from diffusion_jax.diffusion.likelihood import Estimate
from diffusion_jax.errors import ConfigError

KID_SUBSET = 1000
CMMD_SIGMA = 10.0
CMMD_SCALE = 1000.0
FEWEST = 10
Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]


def polynomial(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(x.y/D + 1)^3 of all pairs, the kernel of KID (Binkowski et al. 2018)."""
    return (x @ y.T / x.shape[1] + 1.0) ** 3


def gaussian(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """exp(-|x - y|^2/(2 sigma^2)) of all pairs with sigma = 10, the kernel of CMMD."""
    squares = (x**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2.0 * x @ y.T
    return np.exp(-np.maximum(squares, 0.0) / (2.0 * CMMD_SIGMA**2))


def squared_mmd(kernel: Kernel, x: Any, y: Any) -> float:
    """The unbiased estimate of MMD^2 between features [n, D] and [m, D]; it may be negative."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    n, m = len(x), len(y)
    own = kernel(x, x), kernel(y, y)
    same = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in own]
    return float(same[0] + same[1] - 2.0 * kernel(x, y).sum() / (n * m))


def kernel_distance(
    kernel: Kernel,
    samples: Float[np.ndarray, "n d"],
    reference: Float[np.ndarray, "m d"],
    size: int = KID_SUBSET,
) -> Estimate:
    """MMD^2 as the mean over disjoint subsets of both sets, which are independent of each other.

    Args:
        kernel: `polynomial` or `gaussian`.
        samples: features of the samples.
        reference: features of the reference, in an order of no meaning.
        size: of the subsets, at most; of fewer than 4 size examples on a side they are a quarter,
            but not below 5, so that there are 4 at least (of 10 to 19 examples 2 or 3).

    Raises:
        ConfigError: fewer than 10 examples on a side.
    """
    fewest = min(len(samples), len(reference))
    if fewest < FEWEST:
        raise ConfigError(
            f"{len(samples)} samples, {len(reference)} of the reference: a kernel distance needs "
            f"at least {FEWEST} of each"
        )
    size = min(size, max(fewest // 4, FEWEST // 2))
    count = fewest // size
    values = [
        squared_mmd(kernel, *(part[k * size : (k + 1) * size] for part in (samples, reference)))
        for k in range(count)
    ]
    error = float(np.std(values, ddof=1)) / math.sqrt(count) if count > 1 else math.inf
    return Estimate(float(np.mean(values)), error, len(samples))


def kid(samples: Any, reference: Any, size: int = KID_SUBSET) -> Estimate:
    """The kernel Inception distance (Binkowski et al. 2018) of such features, not scaled."""
    return kernel_distance(polynomial, samples, reference, size)


def cmmd(samples: Any, reference: Any, size: int = KID_SUBSET) -> Estimate:
    """CMMD (Jayasumana et al. 2024): 1000 MMD^2 of CLIP embeddings of length 1, kernel `gaussian`.

    Features of any length are taken, and scaled to 1: from CLIP's projected "features" that makes
    its "normalised" ones. The authors' own estimate keeps the pairs of an example with itself; this
    one has no bias.
    """
    return kernel_distance(gaussian, _unit(samples), _unit(reference), size).scaled(CMMD_SCALE)


def _unit(features: Any) -> np.ndarray:
    return np.asarray(features) / np.linalg.norm(features, axis=1, keepdims=True)
