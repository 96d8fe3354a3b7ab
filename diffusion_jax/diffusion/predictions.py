"""What a network may output, and its way to the pair (x0, eps) and back.

With x = alpha x0 + sigma eps, every prediction is a linear form

  (1)  output = a x0 + b eps

  x0         a = 1                    b = 0
  eps        a = 0                    b = 1
  v          a = -sigma               b = alpha                      (Salimans & Ho 2022)
  score      a = 0                    b = -1 / sigma                 (Song et al. 2021)
  velocity   a = -1                   b = 1                          (Liu et al. 2023)
  edm        a = sigma / (s n)        b = -alpha s / n               (Karras et al. 2022)

where s = sigma_data and n^2 = sigma^2 + alpha^2 s^2. Solving (1) with the state,

  (2)  x0  = (b x - sigma output) / (alpha b - sigma a)
  (3)  eps = (alpha output - a x) / (alpha b - sigma a)

in which common factors of numerator and denominator are cancelled by hand below, so that each is
finite wherever its limit is. At sigma = 0 the state says nothing about eps, whose mean is then 0:
that is returned where a prediction of x0 leaves it open. At alpha = 0 a prediction of eps or of the
score says nothing about x0, which is not finite there: `leaves_x0_open` tells it beforehand.

An error in the output at a given state is an error sigma / |alpha b - sigma a| times as large in
x0, from which `weightings` follow.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from jax.core import Tracer

from diffusion_jax.diffusion.broadcasting import Number, Real, expand, namespace
from diffusion_jax.diffusion.schedule_base import Schedule
from diffusion_jax.errors import ConfigError, unknown_name

PREDICTIONS = ("x0", "eps", "v", "score", "velocity", "edm")
"""Names of all predictions; "edm" is the raw output F of a preconditioned network."""


class Preconditioning(NamedTuple):
    """x0 = c_skip x + c_out F(c_in x); each a scalar or [B], as the alpha and sigma given."""

    c_skip: Any
    c_out: Any
    c_in: Any


def preconditioning(alpha: Real, sigma: Real, sigma_data: Number = 0.5) -> Preconditioning:
    """EDM preconditioning of x0 (Karras et al. 2022, table 1), for any alpha.

    Their x / alpha has noise sigma / alpha; with n^2 = sigma^2 + alpha^2 sigma_data^2 that is
    c_skip = alpha sigma_data^2 / n^2, c_out = sigma sigma_data / n, c_in = 1 / n, so that for data
    of standard deviation `sigma_data` input and target of the network have unit variance at all
    alpha and sigma, alpha = 0 and sigma = 0 included.
    """
    norm = _edm_norm(alpha, sigma, sigma_data)
    return Preconditioning(
        c_skip=alpha * (sigma_data / norm) ** 2, c_out=sigma * sigma_data / norm, c_in=1.0 / norm
    )


def to_x0_eps(
    prediction: str,
    output: Real,
    x: Real,
    alpha: Real,
    sigma: Real,
    *,
    sigma_data: Number = 0.5,
) -> tuple[Any, Any]:
    """The pair (x0, eps) that an output of the named kind means at the state x; (2) and (3).

    Args:
      prediction: one of `PREDICTIONS`; ValueError otherwise.
      output: [B, ...], of the shape of x.
      x: [B, ...], the state alpha x0 + sigma eps.
      alpha: scalar or [B].
      sigma: scalar or [B].
      sigma_data: standard deviation of the data, for "edm" alone.
    """
    alpha, sigma = expand(alpha, x), expand(sigma, x)
    match prediction:
        case "x0":
            return output, _noise(x - alpha * output, sigma)
        case "eps":
            return (x - sigma * output) / alpha, output
        case "v":
            squares = alpha**2 + sigma**2
            return (alpha * x - sigma * output) / squares, (sigma * x + alpha * output) / squares
        case "score":
            return (x + sigma**2 * output) / alpha, -sigma * output
        case "velocity":
            total = alpha + sigma
            return (x - sigma * output) / total, (x + alpha * output) / total
        case "edm":
            c_skip, c_out, c_in = preconditioning(alpha, sigma, sigma_data)
            x0 = c_skip * x + c_out * output
            return x0, c_in * (sigma * c_in * x - alpha * sigma_data * output)
    raise ConfigError(unknown_name("prediction", prediction, PREDICTIONS))


def from_x0_eps(
    prediction: str,
    x0: Real,
    eps: Real,
    alpha: Real,
    sigma: Real,
    *,
    sigma_data: Number = 0.5,
) -> Any:
    """The output of the named kind for this pair: the training target; (1).

    Args:
      prediction: one of `PREDICTIONS`; ValueError otherwise.
      x0: [B, ...].
      eps: [B, ...], of the shape of x0.
      alpha: scalar or [B].
      sigma: scalar or [B].
      sigma_data: standard deviation of the data, for "edm" alone.
    """
    alpha, sigma = expand(alpha, x0), expand(sigma, x0)
    match prediction:
        case "x0":
            return x0
        case "eps":
            return eps
        case "v":
            return alpha * eps - sigma * x0
        case "score":
            return -eps / sigma
        case "velocity":
            return eps - x0
        case "edm":
            norm = _edm_norm(alpha, sigma, sigma_data)
            return (sigma / sigma_data * x0 - alpha * sigma_data * eps) / norm
    raise ConfigError(unknown_name("prediction", prediction, PREDICTIONS))


def leaves_x0_open(prediction: str, schedule: Schedule, t: Number) -> bool:
    """Whether it is "eps" or "score" with alpha(t) = 0; False where the schedule is traced."""
    if prediction not in ("eps", "score"):
        return False
    alpha = schedule.alpha(t)
    return not isinstance(alpha, Tracer) and bool(alpha == 0.0)


def check_prediction(prediction: str, schedule: Schedule) -> None:
    """Refuse a prediction that has no x0 at the start t = 1 of sampling; on the host.

    Raises:
      ValueError: an unknown name, or `leaves_x0_open` there.
    """
    if prediction not in PREDICTIONS:
        raise ConfigError(unknown_name("prediction", prediction, PREDICTIONS))
    if leaves_x0_open(prediction, schedule, 1.0):
        raise ConfigError(
            f"prediction={prediction!r} leaves x0 open at t = 1, where this schedule's alpha is 0: "
            "use 'v', 'x0', 'velocity' or 'edm', or a schedule with alpha(1) > 0"
        )


def _noise(difference: Any, sigma: Any) -> Any:
    """difference / sigma, and 0 where sigma is 0; safe to differentiate."""
    xp = namespace(difference, sigma)
    clean = sigma == 0.0
    return xp.where(clean, 0.0, difference / xp.where(clean, 1.0, sigma))


def _edm_norm(alpha: Any, sigma: Any, sigma_data: Number) -> Any:
    return (sigma**2 + (alpha * sigma_data) ** 2) ** 0.5
