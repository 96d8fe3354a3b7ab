"""Loss weightings: the factor on the squared error of a network's output at each noise level.

By equations (2) and (3) of `predictions`, with the determinant of the pair (state, output)

  (1)  scale = |alpha b - sigma a|
       x0: sigma    eps: alpha    score: alpha / sigma    v: alpha^2 + sigma^2
       velocity: alpha + sigma    edm: sqrt(sigma^2 + alpha^2 s^2) / s,  s = sigma_data

an error in x0 of size e at a given state is an error in the output of size e scale / sigma. So the
squared errors of two predictions p and q of the same x0 are related by

  (2)  |error in q|^2 = (scale_q / scale_p)^2 |error in p|^2

and each weighting is known from the space in which it is plain. Per squared error of x0:

  (3)  uniform_q:  (scale_q / sigma)^2
       snr:        alpha^2 / sigma^2                 the error of eps    (Ho et al. 2020)
       min_snr:    min(alpha^2 / sigma^2, gamma)                         (Hang et al. 2023)
       edm:        (sigma^2 + alpha^2 s^2) / (sigma s)^2   of F          (Karras et al. 2022)
       sigmoid:    snr times logistic(bias - logsnr)                     (Hoogeboom et al. 2024)

each multiplied by (sigma / scale_p)^2 for the output p. Powers of alpha and sigma are cancelled
before anything is divided, so that a weight is finite at alpha = 0 and at sigma = 0 wherever its
limit is; elsewhere, as uniform_x0 for eps at alpha = 0, it is infinite.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.diffusion.broadcasting import Number, Real, namespace
from diffusion_jax.diffusion.predictions import PREDICTIONS
from diffusion_jax.errors import ConfigError, unknown_name

WEIGHTINGS = (
    "uniform",
    "uniform_x0",
    "uniform_eps",
    "uniform_v",
    "uniform_score",
    "uniform_velocity",
    "snr",
    "min_snr",
    "edm",
    "sigmoid",
)
"""Names of all weightings; "uniform" is that of the prediction itself."""


def weight(
    name: str,
    prediction: str,
    alpha: Real,
    sigma: Real,
    *,
    sigma_data: Number = 0.5,
    gamma: Number = 5.0,
    bias: Number = -1.0,
) -> Any:
    """Factor on the per-example mean squared error of the network's output; (3).

    Args:
      name: one of `WEIGHTINGS`.
      prediction: the space of the output, one of `predictions.PREDICTIONS`; for "edm" the error is
        that of the raw output F.
      alpha: scalar or [B], signal factors of the states.
      sigma: scalar or [B], noise factors of the states.
      sigma_data: standard deviation of the data, for the weighting and the prediction "edm".
      gamma: the largest weight on x0, for "min_snr".
      bias: nats of logsnr where the weight on eps is one half, for "sigmoid".

    Returns:
      Scalar or [B], as alpha and sigma; not normalised over noise levels.

    Raises:
      ValueError: an unknown name or prediction.
    """
    if name not in WEIGHTINGS:
        raise ConfigError(unknown_name("weighting", name, WEIGHTINGS))
    if prediction not in PREDICTIONS:
        raise ConfigError(unknown_name("prediction", prediction, PREDICTIONS))
    xp = namespace(alpha, sigma)
    alpha, sigma = xp.asarray(alpha), xp.asarray(sigma)
    ones = xp.ones_like(alpha * sigma)

    def per(factor: _Monomial) -> Any:
        """(factor / scale_p)^2."""
        divisor = _scale(prediction, alpha, sigma, sigma_data)
        quotient = ones * _power(alpha, factor.alpha_power - divisor.alpha_power)
        quotient = quotient * _power(sigma, factor.sigma_power - divisor.sigma_power)
        return (quotient * (factor.rest / divisor.rest)) ** 2

    with np.errstate(divide="ignore"):
        match name:
            case "uniform":
                return ones
            case "snr":
                return per(_ALPHA)
            case "min_snr":
                return xp.minimum(per(_ALPHA), gamma * per(_SIGMA))
            case "edm":
                return per(_scale("edm", alpha, sigma, sigma_data))
            case "sigmoid":
                # snr logistic(bias - logsnr) sigma^2 = (alpha sigma)^2 / (the sum below).
                return per(_ALPHA_SIGMA) / (sigma**2 + alpha**2 * xp.exp(-bias))
        return per(_scale(name.removeprefix("uniform_"), alpha, sigma, sigma_data))


class _Monomial(NamedTuple):
    """alpha^alpha_power sigma^sigma_power rest, with a rest that is neither 0 nor infinite."""

    alpha_power: int
    sigma_power: int
    rest: Any = 1.0


_ALPHA = _Monomial(1, 0)
_SIGMA = _Monomial(0, 1)
_ALPHA_SIGMA = _Monomial(1, 1)


def _scale(prediction: str, alpha: Any, sigma: Any, sigma_data: Number) -> _Monomial:
    """(1)."""
    match prediction:
        case "x0":
            return _SIGMA
        case "eps":
            return _ALPHA
        case "score":
            return _Monomial(1, -1)
        case "v":
            return _Monomial(0, 0, alpha**2 + sigma**2)
        case "velocity":
            return _Monomial(0, 0, alpha + sigma)
    return _Monomial(0, 0, (sigma**2 + (alpha * sigma_data) ** 2) ** 0.5 / sigma_data)


def _power(base: Any, exponent: int) -> Any:
    """base^exponent, which is 1 for exponent 0 also under differentiation at base 0."""
    if exponent < 0:
        return 1.0 / base**-exponent
    return base**exponent if exponent else 1.0
