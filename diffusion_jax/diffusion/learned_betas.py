"""A table of betas that are learned, one a step, as in the 2015 paper.

Sohl-Dickstein et al. 2015 (section 2.4.1) learn beta_2 to beta_T of a Gaussian process by the
gradient of the bound: noise once drawn is kept ("frozen"), and x_t = alpha x0 + sigma eps is a
function of the betas. beta_1 is fixed to a small constant, to prevent overfitting. With logits
l_2 .. l_T, the parameters,

  (1)  beta_1 = first,      beta_i = floor + (1 - 2 floor) logistic(l_i)

and the rest is a table (`beta_tables`): alpha^2 the running product of 1 - beta at t = i / T, the
angle arctan(sigma / alpha) linear between. They begin at

  (2)  beta_i = 1 / (T - i + 1),  and half at i = T                            "fraction", the paper
  (3)  logsnr falls evenly, from that of beta_1 to `logsnr_min`                "logsnr"

where (2) erases an equal part of the data's variance in every step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from diffusion_jax.diffusion.beta_tables import Table
from diffusion_jax.diffusion.broadcasting import Count, Number
from diffusion_jax.diffusion.schedule_base import Schedule
from diffusion_jax.errors import ConfigError, unknown_name

FLOOR = 1e-6
"""No learned beta is below this, or above one less this."""

BEGINNINGS = ("fraction", "logsnr")
"""Names of (2) and (3)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LearnedBetas(Schedule):
    """(1); see `learned_betas`."""

    logits: Any
    """l_2 to l_T, [T - 1]."""
    first: float = dataclasses.field(default=1e-4, metadata={"static": True})
    """beta_1."""

    @property
    def num_steps(self) -> int:
        return len(self.logits) + 1

    @property
    def params(self) -> dict[str, Any]:
        """The parameters."""
        return {"logits": self.logits}

    def with_params(self, params: Mapping[str, Any]) -> LearnedBetas:
        """The schedule of other parameters; JAX arrays make all it gives JAX."""
        return dataclasses.replace(self, logits=params["logits"])

    def betas(self) -> Any:
        """[T], of (1)."""
        xp = jax.numpy if isinstance(self.logits, jax.Array) else np
        learned = FLOOR + (1.0 - 2.0 * FLOOR) * 0.5 * (1.0 + xp.tanh(0.5 * self.logits))
        return xp.concatenate([xp.full(1, self.first, learned.dtype), learned])

    def _table(self, xp: Any) -> Table:
        log_alphabars = xp.cumsum(xp.log1p(-self.betas()))
        zero = xp.zeros(1, log_alphabars.dtype)
        alphas = xp.concatenate([zero + 1.0, xp.exp(0.5 * log_alphabars)])
        sigmas = xp.concatenate([zero, xp.sqrt(-xp.expm1(log_alphabars))])
        return Table(alphas, sigmas, xp.diff(xp.arctan2(sigmas, alphas)))

    def _alpha(self, xp: Any, t: Any) -> Any:
        return self._table(xp)._alpha(xp, t)

    def _sigma(self, xp: Any, t: Any) -> Any:
        return self._table(xp)._sigma(xp, t)

    def _t_from_logsnr(self, xp: Any, logsnr: Any) -> Any:
        return self._table(xp)._t_from_logsnr(xp, logsnr)


def learned_betas(
    steps: Count = 40, first: Number = 1e-4, begin: str = "fraction", logsnr_min: Number = -5.0
) -> LearnedBetas:
    """The betas before they have learned.

    Args:
      steps: T, at least 2; the bound is over these steps.
      first: beta_1, in (0, 1): sets the resolution at which the data are modelled.
      begin: "fraction" or "logsnr", (2) or (3).
      logsnr_min: at t = 1, for "logsnr"; nats.

    Raises:
      ValueError: naming the argument that is out of range.
    """
    if steps < 2:
        raise ConfigError(f"steps={steps}; expected at least 2, one to learn after the first")
    if not 0.0 < first < 1.0:
        raise ConfigError(f"first={first}; expected a variance between 0 and 1, such as 1e-4")
    if begin not in BEGINNINGS:
        raise ConfigError(unknown_name("begin", begin, BEGINNINGS))
    if begin == "fraction":
        betas = 1.0 / np.maximum(np.arange(steps, 0, -1.0), 2.0)[1:]
    else:
        logsnr_max = np.log1p(-float(first)) - np.log(float(first))
        if not logsnr_min < logsnr_max:
            raise ConfigError(f"logsnr_min={logsnr_min}; expected less than {logsnr_max:.3g}")
        alphabars = 1.0 / (1.0 + np.exp(-np.linspace(logsnr_max, float(logsnr_min), int(steps))))
        betas = 1.0 - alphabars[1:] / alphabars[:-1]
    inside = np.clip((betas - FLOOR) / (1.0 - 2.0 * FLOOR), FLOOR, 1.0 - FLOOR)
    return LearnedBetas(np.log(inside) - np.log1p(-inside), float(first))
