"""Schedules given as a table of betas, as DDPM checkpoints carry them.

With alphabar_i = (1 - beta_0) ... (1 - beta_i), step i of T sits at t = (i + 1) / T, where

  (1)  alpha(t)^2 = alphabar_i,   sigma(t)^2 = 1 - alphabar_i

and between the steps, and down to the data at t = 0,

  (2)  arctan(sigma / alpha) is linear in t.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from diffusion_jax.diffusion.broadcasting import Count, Number
from diffusion_jax.diffusion.schedule_base import Schedule
from diffusion_jax.errors import ConfigError

Betas = Float[np.ndarray, " T"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Table(Schedule):
    """Values at t = i / T for i = 0..T, with the angle arctan(sigma / alpha) linear between them.

    See `table`. Past t = 1 the last value holds. The angle is monotone where betas are positive,
    and finite also where alpha = 0, which logsnr and log alpha are not.
    """

    alphas: Any
    """[T + 1], the first of them 1."""
    sigmas: Any
    """[T + 1], the first of them 0."""
    increments: Any
    """[T], of the angle from one step to the next: kept, since float32 differences are poor."""

    @property
    def num_steps(self) -> int:
        return len(self.alphas) - 1

    @property
    def alphabars(self) -> Any:
        """[T], the products of (1 - beta): squared signal factors at t = (i + 1) / T."""
        return self.alphas[1:] ** 2

    def _interpolate(self, xp: Any, t: Any, opposite: Any, adjacent: Any, sign: int) -> Any:
        """sin of the interpolated arctan2(opposite, adjacent), counted from the nearest node."""
        steps, dtype = self.num_steps, t.real.dtype
        t = xp.where(t.real > 1.0, 1.0, t)
        node = xp.clip(xp.round(t.real * steps), 0, steps).astype(int)
        # Exactly 0 for t = i / T, so that the nodes are reproduced to rounding.
        distance = (t - xp.asarray(np.arange(steps + 1) / steps, dtype)[node]) * steps
        ahead = (distance.real >= 0) & (node < steps)
        slope = sign * xp.asarray(self.increments, dtype)[xp.where(ahead, node, node - 1)]
        opposite, adjacent = xp.asarray(opposite, dtype)[node], xp.asarray(adjacent, dtype)[node]
        return xp.sin(xp.arctan2(opposite, adjacent) + distance * slope)

    def _alpha(self, xp: Any, t: Any) -> Any:
        return self._interpolate(xp, t, self.alphas, self.sigmas, -1)

    def _sigma(self, xp: Any, t: Any) -> Any:
        return self._interpolate(xp, t, self.sigmas, self.alphas, 1)

    def _t_from_logsnr(self, xp: Any, logsnr: Any) -> Any:
        dtype = logsnr.dtype
        angles = xp.arctan2(xp.asarray(self.sigmas, dtype), xp.asarray(self.alphas, dtype))
        times = xp.arange(self.num_steps + 1, dtype=dtype) / self.num_steps
        return xp.interp(xp.arctan(xp.exp(-0.5 * logsnr)), angles, times)


def table(betas: Any) -> Table:
    """Schedule of a table of betas (Ho et al. 2020); (1) and (2) of the module.

    Args:
      betas: [T], each in (0, 1); the last may be 1, for zero terminal signal-to-noise ratio.
        Sequences and NumPy arrays.

    Raises:
      ValueError: betas of another shape or range, the first of them named.
    """
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or betas.size == 0:
        raise ConfigError(f"betas of shape {betas.shape} must be one-dimensional and not empty")
    wrong = np.flatnonzero(~((betas > 0.0) & ((betas < 1.0) | _is_last_one(betas))))
    if wrong.size:
        i = int(wrong[0])
        raise ConfigError(f"betas[{i}]={betas[i]} must be in (0, 1), or 1 at the last step only")
    with np.errstate(divide="ignore"):
        log_alphabars = np.cumsum(np.log1p(-betas))
    alphas = np.concatenate([[1.0], np.sqrt(np.cumprod(1.0 - betas))])
    sigmas = np.concatenate([[0.0], np.sqrt(-np.expm1(log_alphabars))])
    return Table(alphas, sigmas, np.diff(np.arctan2(sigmas, alphas)))


def _is_last_one(betas: Betas) -> Any:
    return (np.arange(betas.size) == betas.size - 1) & (betas == 1.0)


def linear_betas(num_steps: Count = 1000, start: Number = 1e-4, end: Number = 0.02) -> Betas:
    """Betas [T] linear from `start` to `end` (Ho et al. 2020, section 4)."""
    return np.linspace(float(start), float(end), _count(num_steps))


def scaled_linear_betas(
    num_steps: Count = 1000, start: Number = 0.00085, end: Number = 0.012
) -> Betas:
    """Betas [T] with a linear square root (Rombach et al. 2022): Stable Diffusion's defaults."""
    return np.linspace(float(start) ** 0.5, float(end) ** 0.5, _count(num_steps)) ** 2


def cosine_betas(num_steps: Count = 1000, s: Number = 0.008, max_beta: Number = 0.999) -> Betas:
    """Betas [T] of the cosine schedule, none above `max_beta` (Nichol & Dhariwal 2021, eq. 17)."""
    times = np.arange(_count(num_steps) + 1) / num_steps
    alphabar = np.cos((times + s) / (1.0 + s) * 0.5 * np.pi) ** 2
    return np.minimum(1.0 - alphabar[1:] / alphabar[:-1], max_beta)


def zero_terminal_snr(betas: Any) -> Betas:
    """Betas [T] whose alphas are shifted and scaled to end at 0 (Lin et al. 2023, algorithm 1).

    Args:
      betas: [T], each in (0, 1). Sequences and NumPy arrays.

    Raises:
      ValueError: fewer than two betas, of which the first cannot be kept.
    """
    if len(betas) < 2:
        raise ConfigError(f"betas of length {len(betas)} must have at least 2 steps")
    alphas = np.sqrt(np.cumprod(1.0 - np.asarray(betas, np.float64)))
    alphas = (alphas - alphas[-1]) * alphas[0] / (alphas[0] - alphas[-1])
    alphabars = alphas**2
    return 1.0 - np.concatenate([alphabars[:1], alphabars[1:] / alphabars[:-1]])


def _count(num_steps: Count) -> Count:
    if num_steps < 1:
        raise ConfigError(f"num_steps={num_steps} must be at least 1")
    return num_steps
