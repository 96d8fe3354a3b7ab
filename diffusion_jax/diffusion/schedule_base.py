"""What a noise schedule is: how much signal and how much noise a state holds at each time.

Time runs from t = 0 (data) to t = 1 (noise):

  (1)  x_t = alpha(t) x0 + sigma(t) eps,         alpha(0) = 1, sigma(0) = 0
  (2)  logsnr(t) = log alpha(t)^2 / sigma(t)^2    strictly decreasing
  (3)  drift(t) = alpha'(t) / alpha(t)
  (4)  diffusion_squared(t) = (sigma^2)'(t) - 2 drift(t) sigma(t)^2
  (5)  velocity = alpha'(t) x0 + sigma'(t) eps    = dx_t/dt at fixed x0, eps

so that dx = drift x dt + sqrt(diffusion_squared) dw has the marginals (1) (Kingma et al. 2021,
"Variational Diffusion Models", appendix). A schedule defines alpha, sigma and the inverse of (2);
the rest is derived here once. Derivatives are exact to rounding: forward-mode differentiation for
JAX input, complex steps, f'(t) = Im f(t + ih) / h, for NumPy input.

Python and NumPy in, float64 NumPy out, without JAX: solver coefficients are computed so. JAX in,
JAX of the same dtype out, accurate in float32: no 1 - alpha^2 is formed where it would cancel.
A schedule is a pytree; a field that holds a JAX array (a learned schedule) makes all output JAX.
At an end where alpha or sigma is a square root of t, its derivative is infinite, and returned so.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
from jaxtyping import Array

from diffusion_jax.diffusion.broadcasting import Number, Real, expand, namespace

Values = jaxtyping.Real[Array | np.ndarray, "*t"] | Number
"""Times or log signal-to-noise ratios, of any shape."""

# The error is of the order of h^2, so that a step this far below every t leaves none.
_COMPLEX_STEP = 1e-40


class Schedule(abc.ABC):
    """Base of all schedules; every method takes and returns arrays of one arbitrary shape."""

    @property
    def num_steps(self) -> int:
        """Steps T of the discrete numbering `timestep = T t - 1`; 1000 unless a table says."""
        return 1000

    @abc.abstractmethod
    def _alpha(self, xp: Any, t: Any) -> Any:
        """alpha(t) in the namespace `xp`, holomorphic in t between branch points."""

    @abc.abstractmethod
    def _sigma(self, xp: Any, t: Any) -> Any:
        """sigma(t) in the namespace `xp`, holomorphic in t between branch points."""

    @abc.abstractmethod
    def _t_from_logsnr(self, xp: Any, logsnr: Any) -> Any:
        """Inverse of (2)."""

    def _sigma_squared(self, xp: Any, t: Any) -> Any:
        """sigma(t)^2; overridden where sigma is its root, whose derivative is infinite at 0."""
        return self._sigma(xp, t) ** 2

    def alpha(self, t: Values) -> Values:
        """Factor of the data in (1)."""
        return self._evaluate(self._alpha, t)

    def sigma(self, t: Values) -> Values:
        """Factor of the noise in (1), its standard deviation."""
        return self._evaluate(self._sigma, t)

    def logsnr(self, t: Values) -> Values:
        """Log signal-to-noise ratio (2), in nats; +inf at t = 0, -inf where alpha = 0."""
        return self._evaluate(
            lambda xp, t: 2.0 * (xp.log(self._alpha(xp, t)) - xp.log(self._sigma(xp, t))), t
        )

    def t_from_logsnr(self, logsnr: Values) -> Values:
        """The time at which `logsnr(t)` has this value; beyond t = 1 where the schedule goes on."""
        return self._evaluate(self._t_from_logsnr, logsnr)

    def dalpha(self, t: Values) -> Values:
        """Derivative of alpha with respect to t."""
        return self._differentiate(self._alpha, t)

    def dsigma(self, t: Values) -> Values:
        """Derivative of sigma with respect to t."""
        return self._differentiate(self._sigma, t)

    def drift(self, t: Values) -> Values:
        """Linear drift coefficient (3); -inf where alpha = 0."""
        with np.errstate(divide="ignore"):
            return self.dalpha(t) / self.alpha(t)

    def diffusion_squared(self, t: Values) -> Values:
        """Squared diffusion coefficient (4); +inf where alpha = 0."""
        sigma_squared = self._evaluate(self._sigma_squared, t)
        return self._differentiate(self._sigma_squared, t) - 2.0 * self.drift(t) * sigma_squared

    def velocity(self, x0: Real, eps: Real, t: Values) -> Real:
        """Velocity (5) of the state [B, ...] at times t, a scalar or [B]."""
        return expand(self.dalpha(t), x0) * x0 + expand(self.dsigma(t), eps) * eps

    def _lift(self, t: Any) -> tuple[Any, Any]:
        """The namespace that computes and t as its floating-point (or complex) array."""
        xp = namespace(t, *(getattr(self, field.name) for field in dataclasses.fields(self)))  # pyright: ignore[reportArgumentType]
        if xp is jnp:
            t = jnp.asarray(t)
            return jnp, t if jnp.issubdtype(t.dtype, jnp.inexact) else t.astype(jnp.float32)
        return np, np.asarray(t, np.complex128 if np.iscomplexobj(t) else np.float64)

    def _evaluate(self, function: Callable[[Any, Any], Any], t: Any) -> Any:
        xp, t = self._lift(t)
        if xp is jnp:
            return function(jnp, t)
        # The infinities at the ends are the right values.
        with np.errstate(divide="ignore", over="ignore"):
            return np.asarray(function(np, t))[()]

    def _differentiate(self, function: Callable[[Any, Any], Any], t: Any) -> Any:
        xp, t = self._lift(t)
        if xp is jnp:
            return jax.jvp(partial(function, jnp), (t,), (jnp.ones_like(t),))[1]
        with np.errstate(over="ignore"):
            return np.imag(self._evaluate(function, t + 1j * _COMPLEX_STEP)) / _COMPLEX_STEP


def root(xp: Any, x: Any) -> Any:
    """Square root whose derivative at 0 is infinite under complex steps, as it is under JAX."""
    value = xp.sqrt(x)
    if not np.iscomplexobj(value):
        return value
    # Nothing but a zero is as small as the step: of a zero, the square of the step may remain.
    at_zero = np.abs(x.real) < np.abs(x.imag)
    imaginary = np.where(at_zero, np.copysign(np.inf, x.imag), value.imag)
    out = np.empty(np.shape(value), np.complex128)
    out.real, out.imag = value.real, imaginary
    return out


def softplus(xp: Any, x: Any) -> Any:
    """log(1 + e^x), without overflow."""
    return xp.logaddexp(0.0, x)
