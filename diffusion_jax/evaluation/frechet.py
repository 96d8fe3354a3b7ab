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
from diffusion_jax.evaluation.moments import Moments, error_of_parts, rounding, together

FEWEST_POINTS = 5
"""Numbers of samples that an extrapolation is fitted to, at least."""


def frechet_distance(first: Moments, second: Moments) -> float:
    """FD of two sets of features, in squared units of these.

    Raises:
        ConfigError: features of another size, or fewer than 2 examples.
    """
    _check(first, second)
    return _distance(first, second, np.linalg.svd(_crossed(first, second), compute_uv=False))


def _check(first: Moments, second: Moments) -> None:
    if first.mean.shape != second.mean.shape:
        raise ConfigError(
            f"features of {first.mean.shape[0]} and {second.mean.shape[0]} dimensions: expected "
            "those of one network"
        )


def _crossed(first: Moments, second: Moments) -> Float64[np.ndarray, "j k"]:
    """R1' R2 with R R' = C. Its singular values are the roots of the eigenvalues of C1 C2; unlike
    roots of computed eigenvalues they are known to rounding however small they are."""
    return first.root.T @ second.root


def _distance(first: Moments, second: Moments, roots: np.ndarray) -> float:
    """FD from the roots of the eigenvalues of C1 C2."""
    apart = first.mean - second.mean
    traces = (np.trace(m.scatter) / (m.count - 1) for m in (first, second))
    return float(apart @ apart + sum(traces) - 2.0 * roots.sum())


def frechet_estimate(parts: list[Moments], reference: Moments) -> Estimate:
    """FD of a set, with a standard error from how much its parts differ (`error_of_parts`).

    The error bar is that of drawing the samples again; the reference is taken as it is. It errs
    upwards (Efron and Stein 1981), by up to sqrt(2) where the two laws are so close that chance
    makes most of the distance. The bias of order 1/n, by which few samples look worse, is not in
    it: see `frechet_infinity`.

    Raises:
        ConfigError: as `frechet_distance`.
    """
    value, slopes = _with_slopes(parts, reference)
    counts = [part.count for part in parts]
    return Estimate(value, error_of_parts(counts, slopes), sum(counts))


def _with_slopes(parts: list[Moments], reference: Moments) -> tuple[float, np.ndarray]:
    """FD of all parts, and its derivative [G] from all examples towards those of each part."""
    whole = together(parts)
    _check(whole, reference)
    _, roots, directions = np.linalg.svd(_crossed(whole, reference), full_matrices=False)
    # d FD = 2 (m1 - m2).dm + tr dC - tr(W dC), W = R (R' C1 R)^(-1/2) R' where that is regular: the
    # samples have no variance elsewhere.
    kept = roots > rounding(roots)
    towards = reference.root @ (directions[kept].T / np.sqrt(roots[kept]))
    slope = np.eye(len(whole.mean)) - towards @ towards.T
    apart = whole.mean - reference.mean
    slopes = []
    for part in parts:
        moved = part.mean - whole.mean
        scatter = np.vdot(slope, part.scatter) / part.count - np.vdot(slope, whole.scatter) / (
            whole.count
        )
        slopes.append(float(scatter + moved @ slope @ moved + 2.0 * apart @ moved))
    return _distance(whole, reference, roots), np.asarray(slopes)


def frechet_infinity(parts: list[Moments], reference: Moments) -> Estimate:
    """FD for infinitely many samples: the intercept of a line in 1/n (Chong and Forsyth 2020).

    The line goes through the distances of the first 1, 2, ... parts together, with weights n, as
    the variance of FD falls like 1/n. The standard error is that of drawing the samples again, to
    first order: the distances share most of their samples, so that the scatter about the line says
    little of it.

    Raises:
        ConfigError: fewer than 5 parts of at least 2 examples.
    """
    if len(parts) < FEWEST_POINTS or min(part.count for part in parts) < 2:
        found = sum(part.count for part in parts)
        raise ConfigError(
            f"{found} samples: the limit of many needs at least {2 * FEWEST_POINTS} of them"
        )
    first = max(1, len(parts) // 5)
    so_far = together(parts[:first])
    ends, values = [so_far.count], [frechet_distance(so_far, reference)]
    for part in parts[first:-1]:
        so_far = so_far + part
        ends.append(so_far.count)
        values.append(frechet_distance(so_far, reference))
    whole, slopes = _with_slopes(parts, reference)
    counts = np.asarray([part.count for part in parts], np.float64)
    ends, values = np.asarray([*ends, counts.sum()]), np.asarray([*values, whole])
    line = np.stack([np.ones_like(ends), 1.0 / ends], axis=1)
    share = np.linalg.solve(line.T @ (ends[:, None] * line), line.T * ends)[0]
    # Of each part in the intercept: what all distances that it is in have of it.
    within = np.arange(len(ends)) >= np.arange(len(parts))[:, None] - (first - 1)
    weight = within @ (share / ends) * counts.sum()
    error = error_of_parts(counts, weight * slopes)
    return Estimate(float(share @ values), error, int(ends[-1]))


def as_moments(statistics: Any, path: str) -> Moments:
    """Moments of published statistics, a mapping of arrays as `numpy.load` gives.

    Read are mu and sigma (pytorch-fid, EDM, ADM), and the number of examples as n or count where it
    is there; otherwise the covariance is taken as it is, that of 2 examples.

    Raises:
        ConfigError: names, shapes or types are others, or sigma is no covariance: not finite, not
            symmetric, or with negative eigenvalues beyond what single precision explains.
    """
    names = sorted(statistics)
    if "mu" not in names or "sigma" not in names:
        raise ConfigError(f"{path}: holds {', '.join(names) or 'nothing'}; expected mu and sigma")
    mean, covariance = np.asarray(statistics["mu"]), np.asarray(statistics["sigma"])
    if mean.ndim != 1 or not mean.size or covariance.shape != (mean.size, mean.size):
        raise ConfigError(
            f"{path}: mu has shape {mean.shape} and sigma {covariance.shape}; expected [D] and "
            "[D, D]"
        )
    for name, values in (("mu", mean), ("sigma", covariance)):
        if values.dtype.kind not in "fiu" or not np.isfinite(values).all():
            raise ConfigError(f"{path}: {name} ({values.dtype}) is not of finite real numbers")
    covariance = covariance.astype(np.float64)
    apart, largest = np.abs(covariance - covariance.T).max(), np.abs(covariance).max()
    if apart > 1e-5 * largest:
        raise ConfigError(f"{path}: sigma is no covariance: not symmetric by {apart:.3g}")
    eigenvalues = np.linalg.eigvalsh(0.5 * (covariance + covariance.T))
    if eigenvalues[0] < -1e-6 * np.abs(eigenvalues).max():
        raise ConfigError(f"{path}: sigma is no covariance: eigenvalue {eigenvalues[0]:.3g}")
    for name in ("n", "count"):
        if name not in names:
            continue
        count = np.asarray(statistics[name])
        if count.ndim or count.dtype.kind not in "fiu" or not 2 <= count < np.inf or count % 1:
            shown = " ".join(repr(count.tolist()).split())
            raise ConfigError(f"{path}: {name}={shown:.80}; expected a whole number from 2")
        return Moments.given(mean, covariance, int(count))
    return Moments.given(mean, covariance, 2)
