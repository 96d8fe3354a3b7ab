"""The Frechet distance between Gaussians, its error bar, and its limit of many samples.

    FD = |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))          (Dowson and Landau 1982)

of the means and covariances of features (Heusel et al. 2017).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float64

from diffusion_jax.diffusion.likelihood import Estimate
from diffusion_jax.errors import ConfigError
from diffusion_jax.evaluation.moments import Moments, jackknife, together

FEWEST_POINTS = 5
"""Numbers of samples that an extrapolation is fitted to, at least."""


def frechet_distance(first: Moments, second: Moments) -> float:
    """FD of two sets of features, in squared units of these.

    Raises:
        ConfigError: features of another size, or fewer than 2 examples.
    """
    if first.mean.shape != second.mean.shape:
        raise ConfigError(
            f"features of {first.mean.shape[0]} and {second.mean.shape[0]} dimensions: expected "
            "those of one network"
        )
    return _distance(first, second, root_of(second.covariance))


def _distance(first: Moments, second: Moments, root: np.ndarray) -> float:
    covariance = first.covariance
    apart = first.mean - second.mean
    traces = np.trace(covariance) + np.trace(second.covariance)
    # (C1 C2)^(1/2) has the eigenvalues of (R' C1 R)^(1/2), R R' = C2: a symmetric matrix, whose
    # spectrum is real and known to rounding even where both are singular.
    crossed = root.T @ covariance @ root
    return float(apart @ apart + traces - 2.0 * np.sqrt(_spectrum(crossed)).sum())


def root_of(covariance: Float64[np.ndarray, "d d"]) -> Float64[np.ndarray, "d k"]:
    """R with R R' = covariance; directions without variance are left out."""
    values, vectors = np.linalg.eigh(0.5 * (covariance + covariance.T))
    kept = values > _noise(values)
    return vectors[:, kept] * np.sqrt(values[kept])


def _spectrum(matrix: np.ndarray) -> np.ndarray:
    """Eigenvalues; those that rounding alone explains, whose roots would add up, are 0."""
    if not matrix.size:
        return np.zeros(0)
    values = np.linalg.eigvalsh(0.5 * (matrix + matrix.T))
    return np.where(values > _noise(values), values, 0.0)


def _noise(values: np.ndarray) -> float:
    return float(len(values) * np.finfo(np.float64).eps * np.abs(values).max(initial=0.0))


def frechet_estimate(parts: list[Moments], reference: Moments) -> Estimate:
    """FD of a set, with the delete-a-group jackknife's standard error over its parts.

    The error bar is that of drawing the samples again; the reference is taken as it is. The bias of
    order 1/n, by which few samples look worse, is not in it: see `frechet_infinity`.
    """
    whole = together(parts)
    root = root_of(reference.covariance)
    value = _distance(whole, reference, root)
    without = []
    if len(parts) > 1 and min(whole.count - part.count for part in parts) >= 2:
        for left_out in range(len(parts)):
            rest = together([part for k, part in enumerate(parts) if k != left_out])
            without.append(_distance(rest, reference, root))
    return Estimate(value, jackknife(without), whole.count)


def frechet_infinity(parts: list[Moments], reference: Moments) -> Estimate:
    """FD for infinitely many samples: the intercept of a line in 1/n (Chong and Forsyth 2020).

    The line goes through the distances of the first 1, 2, ... parts together, with weights n^2, as
    the spread of FD falls like 1/n. The standard error is that of the fit.

    Raises:
        ConfigError: fewer than 5 parts of at least 2 examples.
    """
    if len(parts) < FEWEST_POINTS or min(part.count for part in parts) < 2:
        found = sum(part.count for part in parts)
        raise ConfigError(
            f"{found} samples: the limit of many needs at least {2 * FEWEST_POINTS} of them"
        )
    root = root_of(reference.covariance)
    counts, values = [], []
    for number in range(max(1, len(parts) // 5), len(parts) + 1):
        so_far = together(parts[:number])
        counts.append(so_far.count)
        values.append(_distance(so_far, reference, root))
    return _intercept(np.asarray(counts, np.float64), np.asarray(values), counts[-1])


def _intercept(counts: np.ndarray, values: np.ndarray, n: int) -> Estimate:
    weights = counts / counts.sum()
    line = np.stack([np.ones_like(counts), 1.0 / counts], axis=1)
    normal = line.T @ (weights[:, None] * line)
    found = np.linalg.solve(normal, line.T @ (weights * values))
    left = values - line @ found
    variance = float(weights @ left**2) / max(len(counts) - 2, 1) * len(counts)
    error = float(np.sqrt(max(variance * np.linalg.inv(normal)[0, 0] / len(counts), 0.0)))
    return Estimate(float(found[0]), error, n)


def as_moments(statistics: Any, path: str) -> Moments:
    """Moments of published statistics, a mapping of arrays as `numpy.load` gives.

    Read are mu and sigma (pytorch-fid, EDM, ADM), and the number of examples as n or count where it
    is there; otherwise the covariance is taken as it is.

    Raises:
        ConfigError: names or shapes are others.
    """
    names = sorted(statistics)
    if "mu" not in names or "sigma" not in names:
        raise ConfigError(f"{path}: holds {', '.join(names) or 'nothing'}; expected mu and sigma")
    mean, covariance = np.asarray(statistics["mu"]), np.asarray(statistics["sigma"])
    if mean.ndim != 1 or covariance.shape != (mean.size, mean.size):
        raise ConfigError(
            f"{path}: mu has shape {mean.shape} and sigma {covariance.shape}; expected [D] and "
            "[D, D]"
        )
    count = next((int(statistics[name]) for name in ("n", "count") if name in names), 0)
    return Moments.given(mean, covariance, max(count, 2))
