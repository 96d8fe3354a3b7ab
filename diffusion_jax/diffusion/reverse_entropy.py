"""How much a reverse step leaves open: bounds that need no model and no data.

  (1)  H(x_t | x_s) + H(x_s | x_0) - H(x_t | x_0)  <=  H(x_s | x_t)  <=  H(x_t | x_s)

(Sohl-Dickstein et al. 2015, section 2.6 and appendix A): a step back is at least as uncertain as if
one knew the data, and at most as the step forward. The left side is the entropy of the posterior
q(x_s | x_t, x_0), the right one that of the forward kernel. The right inequality is
H(x_s | x_t) = H(x_t | x_s) + H(x_s) - H(x_t) with an entropy that does not fall, H(x_s) <= H(x_t).

Bits that decay to fair coins never lose entropy. With r = alpha_t/alpha_s and beta the variance of
the forward kernel, a Gaussian process loses none where the entropy power of x_s, at most the mean
of its variances, is at most beta / (1 - r^2) (by the entropy power inequality): 1, where variance
is preserved. For any data it loses at most the -log r of the contraction:

  (2)  H(x_s | x_t)  <=  H(x_t | x_s) - log r

and of data whose elements have the variance v in the mean no more is open than before the step was:

  (3)  H(x_s | x_t)  <=  H(x_s)  <=  log(2 pi e (alpha_s^2 v + sigma_s^2)) / 2
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.diffusion.broadcasting import Number, namespace
from diffusion_jax.diffusion.processes.binomial import Binomial
from diffusion_jax.diffusion.processes.gaussian import Gaussian
from diffusion_jax.diffusion.time_grids import check_times
from diffusion_jax.errors import ConfigError


class EntropyBounds(NamedTuple):
    """Nats per element [steps]; entry k belongs to times[k] -> times[k + 1]."""

    lower: Any
    upper: Any


def reverse_entropy_bounds(
    process: Any, times: Any, *, any_data: bool = False, variance: Number | None = None
) -> EntropyBounds:
    """The bounds (1) on H(x_s | x_t) of every step of `times`, in closed form.

    NumPy float64, or JAX for a schedule of JAX parameters. Over a Gaussian process the entropies
    are those of densities, and the lower one of a step to sigma_s = 0 is -infinity.

    Args:
      process: Gaussian or binomial.
      times: decreasing.
      any_data: (2) in place of the right side of (1), for data of any width.
      variance: v of a Gaussian process, or more. The lower of (2) and (3) then takes the place of
        the right side in steps in which such data may lose entropy. None takes data that lose none,
        such as those of variance 1 where it is preserved.

    Raises:
      ValueError: bad times, or another process.
    """
    times = check_times(times)
    if isinstance(process, Binomial):
        return _binomial(process, times)
    if not isinstance(process, Gaussian):
        raise ConfigError(f"process={process!r}; expected a Gaussian or binomial one")
    of, after = process.schedule, times[1:]
    alpha_t, sigma_t = of.alpha(times[:-1]), of.sigma(times[:-1])
    alpha_s, sigma_s = of.alpha(after), of.sigma(after)
    xp = namespace(alpha_t, sigma_t)
    decay = alpha_t * sigma_s / (alpha_s * sigma_t)
    fresh = (1.0 - decay) * (1.0 + decay)
    with np.errstate(divide="ignore"):
        unit = 0.5 * xp.log(2.0 * math.pi * math.e * fresh)
        lower, upper = unit + xp.log(sigma_s), unit + xp.log(sigma_t)
        ratio = alpha_t / alpha_s
        general = upper - xp.log(ratio)
        if any_data or variance is None:
            return EntropyBounds(lower, general if any_data else upper)
        # No entropy is lost where the mean variance of x_s is at most beta / (1 - r^2).
        before = alpha_s**2 * variance + sigma_s**2
        beta = sigma_t**2 - (ratio * sigma_s) ** 2
        kept = (1.0 - ratio**2) * before <= beta * (1.0 + 1e-6)
        wide = xp.minimum(general, 0.5 * xp.log(2.0 * math.pi * math.e * before))
        return EntropyBounds(lower, xp.where(kept, upper, wide))


def _binomial(process: Binomial, times: np.ndarray) -> EntropyBounds:
    keep = process.keep(times)
    keep_t, keep_s = keep[:-1], keep[1:]
    upper = _coin(0.5 * (1.0 + keep_t / keep_s))
    lower = upper + _coin(0.5 * (1.0 + keep_s)) - _coin(0.5 * (1.0 + keep_t))
    return EntropyBounds(lower, upper)


def _coin(p: Any) -> Any:
    """Entropy of a bit that is 1 with probability p, nats."""
    xp = namespace(p)
    return -sum(q * xp.log(xp.where(q > 0.0, q, 1.0)) for q in (p, 1.0 - p))
