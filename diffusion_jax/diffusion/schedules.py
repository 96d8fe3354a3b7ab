"""The noise schedules by name: `cosine`, `linear_beta`, `scaled_linear`, `edm`, `rectified_flow`,
`sigmoid`, `table` and `learned`, each a function with its published defaults that returns a
`Schedule`.

`schedule_base` numbers the equations that hold for all of them. Arguments may be JAX arrays,
learned or traced; those are not checked. Others raise `ConfigError`, a `ValueError`, where they
are out of range, naming the argument, its value and what it must be.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from diffusion_jax.diffusion.beta_tables import (
    Table,
    cosine_betas,
    linear_betas,
    scaled_linear_betas,
    table,
    zero_terminal_snr,
)
from diffusion_jax.diffusion.broadcasting import Real
from diffusion_jax.diffusion.learned_schedule import Learned, learned
from diffusion_jax.diffusion.schedule_base import Schedule, root, softplus
from diffusion_jax.errors import ConfigError

__all__ = [
    "EDM",
    "SCHEDULES",
    "Cosine",
    "Learned",
    "LinearBeta",
    "OffsetCosine",
    "RectifiedFlow",
    "ScaledLinear",
    "Schedule",
    "Sigmoid",
    "Table",
    "cosine",
    "cosine_betas",
    "edm",
    "learned",
    "linear_beta",
    "linear_betas",
    "rectified_flow",
    "scaled_linear",
    "scaled_linear_betas",
    "sigmoid",
    "table",
    "zero_terminal_snr",
]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cosine(Schedule):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2); see `cosine`."""

    def _alpha(self, xp: Any, t: Any) -> Any:
        # As a sine it is exactly 0 at t = 1.
        return xp.sin(0.5 * np.pi * (1.0 - t))

    def _sigma(self, xp: Any, t: Any) -> Any:
        return xp.sin(0.5 * np.pi * t)

    def _t_from_logsnr(self, xp: Any, logsnr: Any) -> Any:
        return xp.arctan(xp.exp(-0.5 * logsnr)) / (0.5 * np.pi)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OffsetCosine(Schedule):
    """alpha = cos(b(t)) / cos(b(0)), b(t) = (pi / 2) (t + s) / (1 + s); see `cosine`."""

    s: Any

    def _alpha(self, xp: Any, t: Any) -> Any:
        scale = 0.5 * np.pi / (1.0 + self.s)
        return xp.sin(scale * (1.0 - t)) / xp.sin(scale)

    def _sigma_squared(self, xp: Any, t: Any) -> Any:
        # cos^2 a - cos^2 b = sin(b - a) sin(b + a), with a = b(0).
        scale = 0.5 * np.pi / (1.0 + self.s)
        return xp.sin(scale * t) * xp.sin(scale * (t + 2.0 * self.s)) / xp.sin(scale) ** 2

    def _sigma(self, xp: Any, t: Any) -> Any:
        return root(xp, self._sigma_squared(xp, t))

    def _t_from_logsnr(self, xp: Any, logsnr: Any) -> Any:
        scale = 0.5 * np.pi / (1.0 + self.s)
        start = scale * self.s
        cosine = xp.sin(scale)
        variance = xp.exp(-softplus(xp, logsnr))
        # b from sine and cosine together: an arccosine alone is inaccurate near t = 0.
        sine_b = xp.sqrt(xp.sin(start) ** 2 + cosine**2 * variance)
        cosine_b = cosine * xp.exp(-0.5 * softplus(xp, -logsnr))
        return (xp.arctan2(sine_b, cosine_b) - start) / scale


class _IntegratedRate(Schedule):
    """Variance preserving: alpha^2 = exp(-B(t)), sigma^2 = 1 - exp(-B(t)), B = integral of beta."""

    @abc.abstractmethod
    def _integral(self, t: Any) -> Any:
        """B(t)."""

    @abc.abstractmethod
    def _t_from_integral(self, xp: Any, integral: Any) -> Any:
        """Inverse of B."""

    def _alpha(self, xp: Any, t: Any) -> Any:
        return xp.exp(-0.5 * self._integral(t))

    def _sigma_squared(self, xp: Any, t: Any) -> Any:
        return -xp.expm1(-self._integral(t))

    def _sigma(self, xp: Any, t: Any) -> Any:
        return root(xp, self._sigma_squared(xp, t))

    def _t_from_logsnr(self, xp: Any, logsnr: Any) -> Any:
        return self._t_from_integral(xp, softplus(xp, -logsnr))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinearBeta(_IntegratedRate):
    """beta(t) linear from `beta_min` to `beta_max`; see `linear_beta`."""

    beta_min: Any
    beta_max: Any

    def _integral(self, t: Any) -> Any:
        return t * (self.beta_min + 0.5 * t * (self.beta_max - self.beta_min))

    def _t_from_integral(self, xp: Any, integral: Any) -> Any:
        # The root of the quadratic in the form that does not cancel for small integrals.
        slope = self.beta_max - self.beta_min
        return 2.0 * integral / (self.beta_min + xp.sqrt(self.beta_min**2 + 2 * slope * integral))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScaledLinear(_IntegratedRate):
    """sqrt(beta(t)) linear; see `scaled_linear`."""

    beta_min: Any
    beta_max: Any

    def _integral(self, t: Any) -> Any:
        start = self.beta_min**0.5
        slope = self.beta_max**0.5 - start
        return t * (start**2 + t * (start * slope + t * slope**2 / 3.0))

    def _t_from_integral(self, xp: Any, integral: Any) -> Any:
        # r^3 - a^3 = 3 slope B with r = a + slope t, divided by r - a.
        start = self.beta_min**0.5
        root = xp.cbrt(start**3 + 3.0 * (self.beta_max**0.5 - start) * integral)
        return 3.0 * integral / (root**2 + root * start + start**2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EDM(Schedule):
    """alpha = 1, sigma a power of a linear ramp; see `edm`."""

    sigma_min: Any
    sigma_max: Any
    rho: Any

    @property
    def t_min(self) -> Any:
        """Where sigma = sigma_min: the tangent of the power ramp there passes through (0, 0)."""
        return 1.0 / (1.0 + self.rho * ((self.sigma_max / self.sigma_min) ** (1 / self.rho) - 1))

    def _alpha(self, xp: Any, t: Any) -> Any:
        return xp.ones_like(t)

    def _sigma(self, xp: Any, t: Any) -> Any:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        t_min = self.t_min
        ramp = low + (t - t_min) / (1.0 - t_min) * (high - low)
        below = t.real < t_min
        # The unused branch is kept inside the domain of the power, for its derivative.
        power = xp.where(below, low, ramp) ** self.rho
        return xp.where(below, t * (self.sigma_min / t_min), power)

    def _t_from_logsnr(self, xp: Any, logsnr: Any) -> Any:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        sigma, t_min = xp.exp(-0.5 * logsnr), self.t_min
        above = xp.where(sigma < self.sigma_min, self.sigma_min, sigma) ** (1 / self.rho)
        ramp = t_min + (above - low) / (high - low) * (1.0 - t_min)
        return xp.where(sigma < self.sigma_min, t_min * sigma / self.sigma_min, ramp)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RectifiedFlow(Schedule):
    """alpha = 1 - u, sigma = u, u = shift t / (1 + (shift - 1) t); see `rectified_flow`."""

    shift: Any

    def _alpha(self, xp: Any, t: Any) -> Any:
        return (1.0 - t) / (1.0 + (self.shift - 1.0) * t)

    def _sigma(self, xp: Any, t: Any) -> Any:
        return self.shift * t / (1.0 + (self.shift - 1.0) * t)

    def _t_from_logsnr(self, xp: Any, logsnr: Any) -> Any:
        # sigma / alpha = shift t / (1 - t).
        return xp.exp(-softplus(xp, 0.5 * logsnr + xp.log(self.shift)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sigmoid(Schedule):
    """alpha^2 falls along a piece of the logistic function; see `sigmoid`.

    With a = start / tau, b = end / tau, m = a + t (b - a) and w = (b - a) / 2, the differences of
    logistic functions are, without cancellation,
    alpha^2 = sinh((1 - t) w) cosh(a / 2) / (sinh(w) cosh(m / 2)) and
    sigma^2 = sinh(t w) cosh(b / 2) / (sinh(w) cosh(m / 2)).
    """

    start: Any
    end: Any
    tau: Any

    def _half_angles(self) -> tuple[Any, Any, Any]:
        """(a / 2, b / 2, w)."""
        low, high = 0.5 * self.start / self.tau, 0.5 * self.end / self.tau
        return low, high, high - low

    def _squared(self, xp: Any, t: Any, fraction: Any, end: Any) -> Any:
        low, _, width = self._half_angles()
        middle = xp.cosh(low + t * width)
        return xp.sinh(fraction * width) * xp.cosh(end) / (xp.sinh(width) * middle)

    def _sigma_squared(self, xp: Any, t: Any) -> Any:
        return self._squared(xp, t, t, self._half_angles()[1])

    def _alpha(self, xp: Any, t: Any) -> Any:
        return root(xp, self._squared(xp, t, 1.0 - t, self._half_angles()[0]))

    def _sigma(self, xp: Any, t: Any) -> Any:
        return root(xp, self._sigma_squared(xp, t))

    def _t_from_logsnr(self, xp: Any, logsnr: Any) -> Any:
        # sinh((1 - t) w) / sinh(t w) = ratio  <=>  exp(2 t w) = (ratio + e^w) / (ratio + e^-w).
        low, high, width = self._half_angles()
        ratio = xp.exp(logsnr) * xp.cosh(high) / xp.cosh(low)
        return xp.log1p(2.0 * xp.sinh(width) / (ratio + xp.exp(-width))) / (2.0 * width)


def _real(name: str, value: Any, low: float, expected: str, *, open_end: bool = True) -> Any:
    """`value` as a float, or as it is if it is a JAX array, which is not looked into."""
    if isinstance(value, jax.Array):
        return value
    value = float(value)
    if not np.isfinite(value) or value < low or (open_end and value == low):
        raise ConfigError(f"{name}={value!r} must be {expected}")
    return value


def _ordered(low_name: str, low: Any, high_name: str, high: Any, strictly: bool) -> None:
    if isinstance(low, jax.Array) or isinstance(high, jax.Array):
        return
    if low > high or (strictly and low == high):
        relation = "above" if strictly else "at least"
        raise ConfigError(f"{high_name}={high!r} must be {relation} {low_name}={low!r}")


def cosine(s: Real = 0.0) -> Schedule:
    """Cosine schedule (Nichol & Dhariwal 2021, eq. 17), continuous and without their clipping.

    alpha(t) = cos(b(t)) / cos(b(0)), b(t) = (pi / 2) (t + s) / (1 + s); alpha(1) = 0.

    Args:
      s: offset >= 0 in units of t; 0 gives alpha = cos(pi t / 2), 0.008 is the paper's.
    """
    s = _real("s", s, 0.0, ">= 0 (0 for none, 0.008 in the paper)", open_end=False)
    return Cosine() if not isinstance(s, jax.Array) and s == 0.0 else OffsetCosine(s)


def linear_beta(beta_min: Real = 0.1, beta_max: Real = 20.0) -> LinearBeta:
    """Variance-preserving SDE with a linear rate (Song et al. 2021, eq. 32-33).

    log alpha(t) = -t^2 (beta_max - beta_min) / 4 - t beta_min / 2. Rates are per unit of t.
    """
    beta_min = _real("beta_min", beta_min, 0.0, "> 0 (0.1 in the paper)")
    beta_max = _real("beta_max", beta_max, 0.0, "> 0 (20 in the paper)")
    _ordered("beta_min", beta_min, "beta_max", beta_max, strictly=False)
    return LinearBeta(beta_min, beta_max)


def scaled_linear(beta_min: Real = 0.85, beta_max: Real = 12.0) -> ScaledLinear:
    """Rate with a linear square root (Rombach et al. 2022), the limit of many steps.

    beta(t) = (sqrt(beta_min) (1 - t) + sqrt(beta_max) t)^2, per unit of t. A Stable Diffusion
    checkpoint carries the table itself: `table(scaled_linear_betas())`.
    """
    beta_min = _real("beta_min", beta_min, 0.0, "> 0 (0.85 for Stable Diffusion)")
    beta_max = _real("beta_max", beta_max, 0.0, "> 0 (12 for Stable Diffusion)")
    _ordered("beta_min", beta_min, "beta_max", beta_max, strictly=False)
    return ScaledLinear(beta_min, beta_max)


def edm(sigma_min: Real = 0.002, sigma_max: Real = 80.0, rho: Real = 7.0) -> EDM:
    """Variance-exploding schedule of EDM (Karras et al. 2022, eq. 5): alpha = 1.

    sigma(t)^(1/rho) is linear in t from sigma_min at t_min to sigma_max at 1, and goes on past 1.
    Below, sigma falls to 0 along the tangent at t_min = 1 / (1 + rho ((sigma_max/sigma_min)^(1/rho)
    - 1)), about 0.039, so that sigma' is continuous and no free parameter is added.
    """
    sigma_min = _real("sigma_min", sigma_min, 0.0, "> 0 (0.002 in the paper)")
    sigma_max = _real("sigma_max", sigma_max, 0.0, "> 0 (80 in the paper)")
    _ordered("sigma_min", sigma_min, "sigma_max", sigma_max, strictly=True)
    rho = _real("rho", rho, 1.0, ">= 1 (1 is linear, 7 in the paper)", open_end=False)
    return EDM(sigma_min, sigma_max, rho)


def rectified_flow(shift: Real = 1.0) -> RectifiedFlow:
    """Straight paths (Liu et al. 2023; Lipman et al. 2023): alpha = 1 - t, sigma = t.

    Args:
      shift: multiplies sigma / alpha at every t (Esser et al. 2024, eq. 23); 1 leaves it.
    """
    return RectifiedFlow(_real("shift", shift, 0.0, "> 0 (1 for none, 3 for large images)"))


def sigmoid(start: Real = -3.0, end: Real = 3.0, tau: Real = 1.0) -> Sigmoid:
    """Sigmoid schedule (Jabri et al. 2022; Chen 2023, algorithm 1), without their clipping.

    alpha(t)^2 = (f(1) - f(t)) / (f(1) - f(0)), f(t) = logistic((start + t (end - start)) / tau).
    """
    start = _real("start", start, -np.inf, "finite (-3 in the paper)")
    end = _real("end", end, -np.inf, "finite (3 in the paper)")
    _ordered("start", start, "end", end, strictly=True)
    return Sigmoid(start, end, _real("tau", tau, 0.0, "> 0 (1 in the paper)"))


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "cosine": cosine,
    "linear_beta": linear_beta,
    "scaled_linear": scaled_linear,
    "edm": edm,
    "rectified_flow": rectified_flow,
    "sigmoid": sigmoid,
    "table": table,
    "learned": learned,
}
"""Every schedule by its name in a config."""
