"""The log-density of the probability-flow ODE (Song et al. 2021, "Score-based generative modeling
through SDEs", appendix D).

With c^2 = alpha^2 + sigma^2, y = x / c and the angle phi = arctan(sigma / alpha), the ODE of every
Gaussian process is

  (1)  dy / dphi = v(y, phi) = cos(phi) eps_hat - sin(phi) x0_hat

finite at both ends, alpha = 0 and sigma = 0. The density of the data's side follows from the prior,
a standard normal of y, by the instantaneous change of variables (Chen et al. 2018),

  (2)  log p(x) = log N(y(phi_1); 0, I) + int div v dphi - D log c

whose divergence is exact (one backward pass for each dimension) or Hutchinson's z^T (dv/dy) z, z
of unit covariance and kept along the way (Grathwohl et al. 2019): unbiased.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from diffusion_jax.diffusion.broadcasting import Count, Number, expand
from diffusion_jax.diffusion.denoiser import Denoiser, as_denoiser
from diffusion_jax.diffusion.likelihood.adaptive import dormand_prince
from diffusion_jax.diffusion.likelihood.discrete import sum_elements
from diffusion_jax.diffusion.likelihood.traces import probe_vectors, with_divergence
from diffusion_jax.diffusion.schedule_base import Schedule
from diffusion_jax.diffusion.solvers import stepping
from diffusion_jax.diffusion.time_grids import check_times
from diffusion_jax.errors import ConfigError, unknown_name

METHODS = {"euler": (1, ()), "heun": (2, (1.0,)), "rk4": (4, (0.5, 1.0)), "dopri5": (0, ())}
"""Methods: evaluations a step, and where in it others than the first lie; none for the adaptive."""


class FlowDensity(NamedTuple):
    """log p(x), nats per example, with what it is made of; `latent` is y at the noisy end."""

    log_density: Float[Array, " batch"]
    latent: Float[Array, "batch *shape"]
    evaluations: Any
    """Evaluations of the denoiser, each with the backward passes of its trace; an int32 of JAX for
    the adaptive method."""


def flow_log_density(
    denoise: stepping.Denoise,
    schedule: Schedule,
    times: Any,
    x: stepping.Start,
    *,
    key: Array | None = None,
    trace: str = "rademacher",
    probes: Count = 1,
    method: str = "rk4",
    rtol: Number = 1e-5,
    atol: Number = 1e-5,
) -> FlowDensity:
    """log p of `x` [batch, ...] at times[-1], by integrating (1) and (2) up to times[0].

    `times` is a grid of the solvers, decreasing; it is gone through from its end. With equal steps
    in logsnr the methods have order 1, 2 and 4 for "euler", "heun" and "rk4". A grid may end at
    t = 0 where the denoiser's eps is finite there; a little above, p is the density of the data
    with that much noise. The prior is that at times[0], a standard normal of y.

    Args:
      denoise: a function or Denoiser, called without memory of other steps.
      times: [steps + 1].
      x: the state at times[-1], in the process's units: alpha x0 + sigma eps.
      key: for Hutchinson's draws; example i takes fold_in(key, i), or one key an example.
      trace: "rademacher", "gaussian" or "exact".
      probes: draws of Hutchinson's estimate, averaged.
      method: "euler", "heun" or "rk4"; "dopri5" takes of `times` the ends alone and chooses its
        steps by the error (`solvers.adaptive`), of the state and the integrated divergence alike.
      rtol: relative error of "dopri5" in a step.
      atol: absolute error, in units of y and in nats.

    Raises:
      ValueError: bad times; an unknown name; no key where one is needed; fewer than one probe; an
        exact trace of more than 4096 dimensions; tolerances that are not positive.
    """
    x = stepping.start(x)
    denoiser = as_denoiser(denoise, schedule)
    if not isinstance(times, Tracer):
        times = check_times(times)
        denoiser.check_start(times[0])
    if method not in METHODS:
        raise ConfigError(unknown_name("method", method, METHODS))
    dtype = stepping.compute_dtype(x)
    if not (rtol > 0.0 and atol > 0.0):
        raise ConfigError(f"rtol={rtol}, atol={atol}; expected positive numbers")
    vectors = probe_vectors(x.astype(dtype), key, trace, probes)
    slope = functools.partial(_slope, denoiser, vectors, trace == "exact")
    alpha, sigma = schedule.alpha(times[-1]), schedule.sigma(times[-1])
    (scale,) = stepping.cast(x, (alpha**2 + sigma**2) ** 0.5)
    start = (x.astype(dtype) / scale, jnp.zeros(len(x), dtype))
    if method == "dopri5":
        (latent, divergence), evaluations = _adaptive(slope, schedule, times, start, rtol, atol)
    else:
        latent, divergence = _fixed(slope, schedule, times, start, method)
        evaluations = METHODS[method][0] * (len(times) - 1)
    change = divergence - math.prod(x.shape[1:]) * jnp.log(scale)
    return FlowDensity(_log_prior(latent) + change, latent, evaluations)


def _log_prior(y: Array) -> Array:
    """Standard normal log-density [batch]."""
    return -0.5 * sum_elements(y**2) - 0.5 * math.prod(y.shape[1:]) * math.log(2.0 * math.pi)


Pair = tuple[Array, Array]
"""State and accumulated divergence, or their slopes."""


def _fixed(slope: Callable, schedule: Schedule, times: Any, start: Pair, method: str) -> Pair:
    def body(carry: Pair, row: Any) -> tuple[Pair, None]:
        return STEPS[method](slope, carry, *row), None

    rows = _nodes(schedule, times, METHODS[method][1])
    rows = jax.tree.map(lambda a: stepping.cast(start[0], a)[0], rows)
    return jax.lax.scan(body, start, rows)[0]


def _adaptive(
    slope: Callable, schedule: Schedule, times: Any, start: Pair, rtol: Number, atol: Number
) -> tuple[Pair, Array]:
    """Over -phi, which falls; the divergence is one more element of the state."""
    y, _ = start
    ends: Any = [(schedule.sigma(t), schedule.alpha(t)) for t in (times[-1], times[0])]
    first, last = (-jnp.arctan2(*stepping.cast(y, *end)) for end in ends)

    def slope_at(u: Array, joined: Array) -> Array:
        # At phi = pi / 2, which rounding may pass, the floor keeps the ratio finite.
        sine, cosine = jnp.sin(-u), jnp.maximum(jnp.cos(u), 1e-12)
        t = schedule.t_from_logsnr(2.0 * (jnp.log(cosine) - jnp.log(sine)))
        state = joined[:, :-1].reshape(y.shape)
        node = _Node(t, cosine, sine, (schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2) ** 0.5)
        velocity, divergence = slope(state, node)
        return -_join(velocity, divergence)

    joined, evaluations = dormand_prince(slope_at, first, _join(*start), last, rtol=rtol, atol=atol)
    return (joined[:, :-1].reshape(y.shape), joined[:, -1]), evaluations


def _join(y: Array, divergence: Array) -> Array:
    return jnp.concatenate([y.reshape(len(y), -1), divergence[:, None]], axis=1)


class _Node(NamedTuple):
    """Where v is evaluated: the time, its cosine and sine of phi, and alpha^2 + sigma^2's root."""

    t: Any
    cosine: Any
    sine: Any
    scale: Any


def _nodes(schedule: Schedule, times: Any, inner: tuple[float, ...]) -> tuple[tuple, Any]:
    """The nodes of every step, from data to noise, [steps] each, and the steps' widths in phi."""
    alpha, sigma = schedule.alpha(times[::-1]), schedule.sigma(times[::-1])
    xp: Any = jnp if isinstance(alpha, jax.Array) or isinstance(sigma, jax.Array) else np
    phi = xp.arctan2(sigma, alpha)
    widths = phi[1:] - phi[:-1]
    forward = xp.asarray(times[::-1])

    def node(t: Any) -> _Node:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        scale = (alpha**2 + sigma**2) ** 0.5
        return _Node(t, alpha / scale, sigma / scale, scale)

    result = [node(forward[:-1])]
    for place in inner:
        if place == 1.0:
            result.append(node(forward[1:]))
        else:
            angle = phi[:-1] + place * widths
            result.append(node(schedule.t_from_logsnr(-2.0 * xp.log(xp.tan(angle)))))
    return tuple(result), widths


def _slope(
    denoiser: Denoiser, vectors: Array, exact: bool, y: Array, node: _Node
) -> tuple[Array, Array]:
    """v and its divergence [batch] at a node."""

    def velocity(y: Array) -> Array:
        scale, cosine, sine = (expand(v, y) for v in (node.scale, node.cosine, node.sine))
        denoised = denoiser(scale * y, node.t)
        return cosine * denoised.eps - sine * denoised.x0

    return with_divergence(velocity, vectors, exact, y)


def _ahead(state: Pair, width: Any, slope: Pair) -> Pair:
    return state[0] + width * slope[0], state[1] + width * slope[1]


def _euler(slope: Callable, state: Pair, nodes: tuple, width: Any) -> Pair:
    return _ahead(state, width, slope(state[0], nodes[0]))


def _heun(slope: Callable, state: Pair, nodes: tuple, width: Any) -> Pair:
    first = slope(state[0], nodes[0])
    second = slope(_ahead(state, width, first)[0], nodes[1])
    return _ahead(_ahead(state, 0.5 * width, first), 0.5 * width, second)


def _rk4(slope: Callable, state: Pair, nodes: tuple, width: Any) -> Pair:
    first = slope(state[0], nodes[0])
    second = slope(_ahead(state, 0.5 * width, first)[0], nodes[1])
    third = slope(_ahead(state, 0.5 * width, second)[0], nodes[1])
    fourth = slope(_ahead(state, width, third)[0], nodes[2])
    for part, share in ((first, 1 / 6), (second, 1 / 3), (third, 1 / 3), (fourth, 1 / 6)):
        state = _ahead(state, share * width, part)
    return state


STEPS: dict[str, Callable[..., Pair]] = {"euler": _euler, "heun": _heun, "rk4": _rk4}
