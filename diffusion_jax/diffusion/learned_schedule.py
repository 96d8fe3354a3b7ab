"""A noise schedule that is learned: monotone in t by construction, its ends among the parameters.

With the place u = (t - t_min) / (1 - t_min) between the ends, Kingma et al. 2021 ("Variational
Diffusion Models", appendix H) put

  (1)  logsnr(t) = logsnr_max + (logsnr_min - logsnr_max) s(u),       s(0) = 0, s(1) = 1
  (2)  s(u) = (g(u) - g(0)) / (g(1) - g(0)),      g(u) = a u + sum_k w_k logistic(r_k (u - m_k))

with positive a, w_k, r_k, whose logarithms are the parameters, and alpha^2 + sigma^2 = 1. The shape
s changes nothing of the bound in continuous time, but the variance of its estimate; the ends do
change it. Their network is (2) without the factor r_k m_k taken out.

At t = 0 there is no noise, as in every schedule: below t_min, sigma falls linearly to 0. The bound
ends at t_min, so that this piece serves sampling alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion_jax.diffusion.broadcasting import Count, Number, Real
from diffusion_jax.diffusion.schedule_base import Schedule
from diffusion_jax.errors import ConfigError

BISECTIONS = 50
"""Halvings of [0, 1] to a place of given logsnr; a step of Newton's method follows."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Learned(Schedule):
    """(1) and (2); see `learned`. Fields are parameters, but for `t_min`."""

    logsnr_max: Any
    """At t_min, a scalar."""
    logsnr_min: Any
    """At t = 1, a scalar."""
    log_slope: Any
    """log a, a scalar."""
    log_weights: Any
    """log w_k, [units]."""
    log_rates: Any
    """log r_k, [units]."""
    centres: Any
    """m_k, [units]."""
    t_min: float = dataclasses.field(default=1e-3, metadata={"static": True})

    @property
    def params(self) -> dict[str, dict[str, Any]]:
        """The parameters: `ends`, which move the bound, and `shape`, which does not."""
        ends = {"logsnr_max": self.logsnr_max, "logsnr_min": self.logsnr_min}
        names = ("log_slope", "log_weights", "log_rates", "centres")
        return {"ends": ends, "shape": {name: getattr(self, name) for name in names}}

    def with_params(self, params: Mapping[str, Mapping[str, Any]]) -> Learned:
        """The schedule of other parameters; JAX arrays make all it gives JAX."""
        return dataclasses.replace(self, **params["ends"], **params["shape"])

    def place(self, t: Any) -> Any:
        """u of t, 0 below t_min."""
        return (t - self.t_min) / (1.0 - self.t_min)

    def time(self, u: Any) -> Any:
        """t of u."""
        return self.t_min + (1.0 - self.t_min) * u

    def inner(self, u: Float[Array, "*b"]) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
        """s(u) of (2) and its derivative, for u in [0, 1]."""
        return jax.jvp(lambda u: self._shape(jnp, u), (u,), (jnp.ones_like(u),))

    def at(self, s: Any) -> Any:
        """logsnr where the shape is `s`."""
        return self.logsnr_max + (self.logsnr_min - self.logsnr_max) * s

    def _shape(self, xp: Any, u: Any) -> Any:
        slope, weights, rates = (
            xp.exp(v) for v in (self.log_slope, self.log_weights, self.log_rates)
        )

        def rise(u: Any) -> Any:
            half, base = 0.5 * rates * u, 0.5 * rates * self.centres
            return 0.5 * (xp.tanh(half - base) + xp.tanh(base))

        whole = slope + (weights * rise(1.0)).sum()
        return (slope * u + (weights * rise(u[..., None])).sum(-1)) / whole

    def _logsnr_inside(self, xp: Any, t: Any) -> Any:
        """(1), and at t_min below."""
        return self.at(self._shape(xp, xp.where(t.real < self.t_min, 0.0, self.place(t))))

    def _sigma(self, xp: Any, t: Any) -> Any:
        sigma = 1.0 / xp.sqrt(1.0 + xp.exp(self._logsnr_inside(xp, t)))
        return sigma * xp.where(t.real < self.t_min, t / self.t_min, 1.0)

    def _alpha(self, xp: Any, t: Any) -> Any:
        logsnr = self._logsnr_inside(xp, t)
        variance = (t / self.t_min) ** 2 / (1.0 + xp.exp(logsnr))
        below = t.real < self.t_min
        # The branch that is not taken is kept inside the domain of the root.
        ramp = xp.sqrt(1.0 - xp.where(below, variance, 0.0))
        return xp.where(below, ramp, 1.0 / xp.sqrt(1.0 + xp.exp(-logsnr)))

    def _t_from_logsnr(self, xp: Any, logsnr: Any) -> Any:
        wanted = (logsnr - self.logsnr_max) / (self.logsnr_min - self.logsnr_max)
        inside = xp.clip(wanted, 0.0, 1.0)
        u = self._place_of(xp, inside)
        # sigma / sigma(t_min) below t_min, by 1 + snr.
        least = self.logsnr_max + xp.log1p(xp.exp(-self.logsnr_max))
        log_ratio = least - xp.logaddexp(0.0, xp.maximum(logsnr, self.logsnr_max))
        return xp.where(wanted < 0.0, self.t_min * xp.exp(0.5 * log_ratio), self.time(u))

    def _place_of(self, xp: Any, s: Any) -> Any:
        """The u at which the shape is s in [0, 1], differentiable; t = 1 holds beyond."""

        def halve(_: Any, ends: tuple[Any, Any]) -> tuple[Any, Any]:
            low, high = ends
            middle = 0.5 * (low + high)
            below = self._shape(xp, middle) < s
            return xp.where(below, middle, low), xp.where(below, high, middle)

        ends = (xp.zeros_like(s), xp.ones_like(s))
        if xp is np:
            for step in range(BISECTIONS):
                ends = halve(step, ends)
            return 0.5 * (ends[0] + ends[1])
        low, high = jax.lax.stop_gradient(jax.lax.fori_loop(0, BISECTIONS, halve, ends))
        u = 0.5 * (low + high)
        value, slope = self.inner(u)
        # Where the bisection has it already, this is the derivative of the inverse alone.
        return u + (s - value) / jax.lax.stop_gradient(slope)


def learned(
    logsnr_max: Real = 13.3, logsnr_min: Real = -5.0, units: Count = 32, t_min: Number = 1e-3
) -> Learned:
    """The schedule before it has learned: logsnr nearly linear in t (VDM, appendix H).

    Args:
      logsnr_max: at t_min, nats; 13.3 in the paper, for pixels.
      logsnr_min: at t = 1.
      units: logistic functions in the shape, in even places.
      t_min: in (0, 1), where the schedule begins; below, sigma is linear in t.

    Raises:
      ValueError: fewer than one unit, a t_min out of range, ends out of order or not finite.
    """
    if units < 1:
        raise ConfigError(f"units={units}; expected at least 1")
    if not 0.0 < t_min < 1.0:
        raise ConfigError(f"t_min={t_min}; expected a time between 0 and 1")
    if not np.isfinite([float(logsnr_max), float(logsnr_min)]).all() or logsnr_min >= logsnr_max:
        raise ConfigError(
            f"logsnr_min={logsnr_min}, logsnr_max={logsnr_max}; expected finite numbers with "
            "logsnr_min < logsnr_max"
        )
    return Learned(
        logsnr_max=np.float64(logsnr_max),
        logsnr_min=np.float64(logsnr_min),
        log_slope=np.log(0.5),
        log_weights=np.full(units, np.log(0.5 / units)),
        log_rates=np.full(units, np.log(float(units))),
        centres=(np.arange(units) + 0.5) / units,
        t_min=float(t_min),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Level(Schedule):
    """One noise level an example, known without its time: alpha^2 + sigma^2 = 1 whatever t is."""

    logsnr_values: Any
    """[B], or a scalar; nats."""

    def _alpha(self, xp: Any, t: Any) -> Any:
        return 1.0 / xp.sqrt(1.0 + xp.exp(-self.logsnr_values))

    def _sigma(self, xp: Any, t: Any) -> Any:
        return 1.0 / xp.sqrt(1.0 + xp.exp(self.logsnr_values))

    def _t_from_logsnr(self, xp: Any, logsnr: Any) -> Any:
        raise NotImplementedError("the level of a state is known here, not its time")
