"""The denoiser: what solvers, guidance and likelihoods know of a trained network.

  (1)  x0_hat = E[x0 | x_t = x],    eps_hat = (x - alpha(t) x0_hat) / sigma(t)

A transform may change x0 alone, which is why both are carried. A denoiser may also carry state
from one solver step to the next; most carry nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion_jax.diffusion.broadcasting import Number, Real, expand, floating_type, namespace
from diffusion_jax.diffusion.predictions import (
    PREDICTIONS,
    leaves_x0_open,
    preconditioning,
    to_x0_eps,
)
from diffusion_jax.diffusion.schedule_base import Schedule
from diffusion_jax.errors import ConfigError, unknown_name

NOISE_INPUTS = ("logsnr", "t", "c_noise", "timestep")
"""Names of the ways in which a network may be told the noise level; see `noise_input`."""

LOGSNR_LIMIT = 20.0
"""Networks see no logsnr beyond this, nats: it is infinite at the ends of most schedules."""


class Denoised(NamedTuple):
    """What a denoiser says of a state [B, ...]."""

    x0: Any
    """Estimate of the data, [B, ...]."""
    eps: Any = None
    """Estimate of the noise, [B, ...]; None for that of (1), with x0 as it is in the end."""
    variance_fraction: Any = None
    """Learned reverse variance in [0, 1], [B, ...]: 0 the small, 1 the large one, in log."""


def _no_carry(x: Any) -> Any:
    return ()


def _anywhere(t: float) -> None:
    """Refuses no start."""


@dataclass(frozen=True)
class Denoiser:
    """A denoiser with conditioning bound.

    Attributes:
      step: (x [B, ...], t scalar or [B], carry) -> (Denoised, next carry), pure.
      init: x -> the carry of the first step; a pytree of fixed structure. Nothing by default.
      check_start: raises ValueError for a time, times[0] of a solver, at which it has no x0; on the
        host, since what a step returns is not looked into. A denoiser made of others asks them.
    """

    step: Callable[[Any, Any, Any], tuple[Denoised, Any]]
    init: Callable[[Any], Any] = _no_carry
    check_start: Callable[[float], None] = _anywhere

    def __call__(self, x: Real, t: Real) -> Denoised:
        """Denoise x [B, ...] at t, a scalar or [B], with a fresh carry."""
        return self.step(x, t, self.init(x))[0]


def as_denoiser(
    denoise: Denoiser | Callable[[Any, Any], Any],
    schedule: Schedule | None = None,
) -> Denoiser:
    """Lift a function (x, t) -> x0 or -> `Denoised` to a `Denoiser`, and complete what either says.

    x0 and eps come in the shape and the floating type of x, to which they must broadcast. Where eps
    is None it follows by (1), or stays None without a schedule. Of tokens, which are whole numbers,
    x0 [B, ..., K] are probabilities and there is no eps: they pass as they are.
    """
    plain = denoise if isinstance(denoise, Denoiser) else _from_function(denoise)

    def step(x: Any, t: Any, carry: Any) -> tuple[Denoised, Any]:
        denoised, carry = plain.step(x, t, carry)
        if jnp.issubdtype(jnp.result_type(x), jnp.integer):
            return denoised, carry
        x0, eps = _like(denoised.x0, x), denoised.eps
        if eps is None and schedule is not None:
            eps = to_x0_eps("x0", x0, x, schedule.alpha(t), schedule.sigma(t))[1]
        return denoised._replace(x0=x0, eps=None if eps is None else _like(eps, x)), carry

    return replace(plain, step=step)


def _from_function(function: Callable[[Any, Any], Any]) -> Denoiser:
    def step(x: Any, t: Any, carry: Any) -> tuple[Denoised, Any]:
        output = function(x, t)
        return output if isinstance(output, Denoised) else Denoised(output), carry

    return Denoiser(step)


def _like(value: Any, x: Any) -> Any:
    """`value` in the shape and the floating type of x."""
    xp = namespace(value, x)
    array = xp.asarray(value, floating_type(xp, x))
    if array.shape == np.shape(x):
        return array
    try:
        return xp.broadcast_to(array, np.shape(x))
    except ValueError:
        raise ConfigError(
            f"the denoiser gives shape {array.shape} for a state of shape {np.shape(x)}"
        ) from None


def noise_input(kind: str, schedule: Schedule, t: Real) -> Float[Array, "*b"]:
    """The number by which a network is told the noise level, float32 of the shape of t.

    Args:
      kind: "logsnr", clipped to +-20 nats; "t"; "c_noise" = log(sigma / alpha) / 4 of EDM (Karras
        et al. 2022, table 1), of the clipped logsnr; "timestep" = T t - 1, the index of DDPM's
        tables, T = 1000 where the schedule is no table.
      schedule: gives logsnr and T.
      t: scalar or [B].

    Raises:
      ValueError: an unknown kind.
    """
    match kind:
        case "logsnr":
            noise = _clipped_logsnr(schedule, t)
        case "t":
            noise = t
        case "c_noise":
            noise = -0.125 * _clipped_logsnr(schedule, t)
        case "timestep":
            noise = schedule.num_steps * t - 1.0
        case _:
            raise ConfigError(unknown_name("noise_input", kind, NOISE_INPUTS))
    return jnp.asarray(noise, jnp.float32)


def from_network(
    predict: Callable[[Any, Any], Any],
    schedule: Schedule,
    prediction: str,
    *,
    noise_input: str = "logsnr",
    sigma_data: Number = 0.5,
    learned_variance: bool = False,
) -> Denoiser:
    """The denoiser of a trained network.

    Args:
      predict: (x [B, ...], noise float32 [B]) -> output [B, ...], with parameters and conditioning
        bound. For prediction "edm" it is given c_in x and returns F.
      schedule: of the states that `predict` was trained on.
      prediction: one of `predictions.PREDICTIONS`.
      noise_input: one of `NOISE_INPUTS`.
      sigma_data: standard deviation of the data, for "edm" alone.
      learned_variance: the output has twice the channels (last axis) of x; the second half, from
        -1 to 1, is the learned range of Nichol & Dhariwal (2021, eq. 15) and becomes
        `variance_fraction` in [0, 1].

    Raises:
      ValueError: an unknown name, or, when the denoiser is traced, an output of the wrong shape;
        from `check_start` of the result, "eps" or "score" where alpha is 0.
    """
    if prediction not in PREDICTIONS:
        raise ConfigError(unknown_name("prediction", prediction, PREDICTIONS))
    if noise_input not in NOISE_INPUTS:
        raise ConfigError(unknown_name("noise_input", noise_input, NOISE_INPUTS))

    def step(x: Any, t: Any, carry: Any) -> tuple[Denoised, Any]:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        scaled = x
        if prediction == "edm":
            c_in = preconditioning(alpha, sigma, sigma_data).c_in
            scaled = expand(c_in, x) * x
        noise = jnp.broadcast_to(_noise_input(noise_input, schedule, t), x.shape[:1])
        output, fraction = split_variance(predict(scaled, noise), x.shape, learned_variance)
        x0, eps = to_x0_eps(prediction, output, x, alpha, sigma, sigma_data=sigma_data)
        return Denoised(x0, eps, fraction), carry

    def check_start(t: float) -> None:
        if leaves_x0_open(prediction, schedule, t):
            raise ConfigError(
                f"prediction={prediction!r} leaves x0 open at times[0]={t:g}, where alpha is 0: "
                f"use 'v', 'x0' or 'velocity', or a time grid that starts below {t:g}"
            )

    return Denoiser(step, check_start=check_start)


def split_variance(output: Any, shape: tuple[int, ...], learned_variance: bool) -> tuple[Any, Any]:
    """The output proper and, of an output with twice the channels of `shape`, the fraction.

    Raises:
      ValueError: an output of another shape.
    """
    expected = (*shape[:-1], 2 * shape[-1]) if learned_variance else shape
    if output.shape != expected:
        raise ConfigError(
            f"the network's output has shape {output.shape}, expected {expected}: set its "
            f"out_channels, or learned_variance={not learned_variance}"
        )
    if not learned_variance:
        return output, None
    output, learned = jnp.split(output, 2, axis=-1)
    return output, 0.5 * (learned + 1.0)


def _clipped_logsnr(schedule: Schedule, t: Any) -> Any:
    logsnr = schedule.logsnr(t)
    return namespace(logsnr).clip(logsnr, -LOGSNR_LIMIT, LOGSNR_LIMIT)


# The keyword of `from_network` hides the function of the same name.
_noise_input = noise_input
