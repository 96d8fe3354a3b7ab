"""Exponential integrators: the coefficients and the one scan of the DPM-Solver family.

With y the solution over a step of h = rise of log(alpha/sigma), all of them integrate exactly

  (1)  x_s = a x_t + integral over u in [0, h] of weight(u) m(u) du

for a polynomial m through values of the denoiser, m being x0 (DPM-Solver++) or eps (DPM-Solver).
With w_k, what multiplies h^(k-1) times derivative k - 1 of m at the start of the step,

  (2)  x0:      a = sigma_s/sigma_t,       w_k = alpha_s h phi_k(-h)
  (3)  eps:     a = alpha_s/alpha_t,       w_k = -sigma_s h phi_k(h)
  (4)  sde_x0:  a = e^-h sigma_s/sigma_t,  w_k = 2 alpha_s h phi_k(-2h)
  (5)  sde_eps: a = alpha_s/alpha_t,       w_k = -2 sigma_s h phi_k(h)

  (6)  phi_k(z) = integral over u in [0, 1] of e^((1-u) z) u^(k-1)/(k-1)! du

(Lu et al. 2022, "DPM-Solver", equation 3.4, and "DPM-Solver++", equations 8 and 16). Only w_1 is
finite where h is infinite, from alpha_t = 0 or to sigma_s = 0, and is computed from ratios: such a
step is of order 1, and the steps after one from alpha_t = 0 do not look back beyond its end.

The orders that the solvers state are those in h. From alpha_t = 0 the next h are about log 2,
log 3/2, ..., however many steps there are: orders 2 and 3 are both of second order in the number of
steps from there, and differ in the constant alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

from diffusion_jax.diffusion.solvers.stepping import Steps


class Weights(NamedTuple):
    """Equations (2) to (5), each [steps]: a, w_k = scale phi_k at w[k - 1], and a finite h."""

    to_x: Any
    w: tuple[Any, ...]
    scale: Any
    h: Any


def phi(xp: ModuleType, k: int, z: Any) -> Any:
    """Equation (6), to a few roundings: by its series near 0, else phi_(k+1) = (phi_k - 1/k!)/z."""
    near = abs(z) < 0.5
    small, large = xp.where(near, z, 0.0), xp.where(near, 1.0, z)
    series = sum(small**n / float(math.factorial(n + k)) for n in range(15))
    value = xp.expm1(large) / large
    for n in range(1, k):
        value = (value - 1.0 / math.factorial(n)) / large
    return xp.where(near, series, value)


def finite_rise(steps: Steps) -> tuple[Any, Any]:
    """Where h is finite, and h with 1 where it is not; so is that of a step between equal levels,
    which some recorded grids end with and over which nothing can be extrapolated."""
    rise = steps.rise
    usable = steps.xp.isfinite(rise) & (rise > 1e-12)
    return usable, steps.xp.where(usable, rise, 1.0)


def begins(steps: Steps) -> Any:
    """Where h is finite but not that of the step before: of order 1, whatever the method."""
    finite, _ = finite_rise(steps)
    return finite & ~steps.xp.concatenate([steps.xp.zeros_like(finite[:1]), finite[:-1]])


def direct(form: str, steps: Steps) -> Any:
    """Where a step of eps needs no x0: from alpha_t > 0, with noise also to sigma_s > 0 only."""
    return steps.alpha_t > 0.0 if form == "eps" else steps.xp.isfinite(steps.rise)


def weights(form: str, steps: Steps) -> Weights:
    """Equations (2) to (5) of the steps; w_2, ... are 0 where h is infinite.

    For eps, a step that is not `direct` is x_s = sigma_s eps, with noise 0, to which the caller
    adds alpha_s x0, and with noise sigma_s z.
    """
    xp = steps.xp
    finite, h = finite_rise(steps)
    if form == "x0":
        to_x, first = steps.sigma_ratio, steps.alpha_s * (1.0 - steps.decay)
        scale, z = steps.alpha_s * h, -h
    elif form == "sde_x0":
        to_x, first = steps.sigma_ratio * steps.decay, steps.alpha_s * steps.fresh
        scale, z = 2.0 * steps.alpha_s * h, -2.0 * h
    else:
        signal = direct(form, steps)
        ratio = steps.alpha_s / xp.where(signal, steps.alpha_t, 1.0)
        times = 2.0 if form == "sde_eps" else 1.0
        to_x = xp.where(signal, ratio, 0.0)
        left = steps.sigma_s if form == "eps" else 0.0
        first = xp.where(signal, times * (steps.sigma_s - ratio * steps.sigma_t), left)
        scale, z = -times * steps.sigma_s * h, h
    higher = (xp.where(finite, scale * phi(xp, k, z), 0.0) for k in (2, 3, 4))
    return Weights(to_x, (first, *higher), scale, h)


def on_values(w: Sequence[Any], nodes: Sequence[Any]) -> list[Any]:
    """Exact for polynomials: what multiplies m at 0 and at the nodes, given in units of h.

    With the differences D_j = (m(r_j) - m(0))/r_j it is w_1 m(0) + sum_j v_j D_j where
    sum_j v_j r_j^k = (k + 1)! w_(k+2); a Vandermonde system, solved by Lagrange's polynomials.
    """
    out = []
    for j, node in enumerate(nodes):
        coefficients: list[Any] = [1.0]
        for i, other in enumerate(nodes):
            if i == j:
                continue
            span = node - other
            raised, kept = [0.0, *coefficients], [*coefficients, 0.0]
            coefficients = [(a - other * b) / span for a, b in zip(raised, kept, strict=True)]
        v = sum(c * math.factorial(k + 1) * w[k + 1] for k, c in enumerate(coefficients))
        out.append(v / node)
    return [w[0] - sum(out), *out]


def before(xp: ModuleType, values: Any, by: int) -> Any:
    """The value `by` steps before each step; the first one where there is none."""
    if by == 0:
        return values
    return xp.concatenate(
        [values[:1]] * min(by, len(values)) + [values[: max(len(values) - by, 0)]]
    )
