"""A learned schedule of bits: what share of the signal each step of the bound erases.

Sohl-Dickstein et al. 2015 (section 2.4.1) erase 1/T of it in each of T steps, and learn the betas
of Gaussian processes alone: no gradient passes through states that are bits. That of their
probability takes its place here (`objectives.variational`). With logits l_1 .. l_T, the parameters,

  (1)  keep(i/T) = p_(i+1) + ... + p_T,      p = floor + (1 - T floor) softmax(l)

and linear between. l = 0 is the paper's schedule; keep(1) = 0 always, so that the prior is exact.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from diffusion_jax.diffusion.broadcasting import Count, namespace
from diffusion_jax.errors import ConfigError

FLOOR = 1e-6
"""No step erases less."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LearnedKeep:
    """(1), a `Binomial.keep`; see `learned_keep`."""

    logits: Any
    """[T]."""

    @property
    def params(self) -> dict[str, Any]:
        """The parameters."""
        return {"logits": self.logits}

    def with_params(self, params: Mapping[str, Any]) -> LearnedKeep:
        """The schedule of other parameters; JAX arrays make all it gives JAX."""
        return dataclasses.replace(self, logits=params["logits"])

    def __call__(self, t: Any) -> Any:
        """keep(t) of times of any shape."""
        xp, steps = namespace(t, self.logits), len(self.logits)
        shifted = xp.exp(self.logits - xp.max(self.logits))
        share = FLOOR + (1.0 - steps * FLOOR) * shifted / xp.sum(shifted)
        # From the far end: little is left there, and would drown in 1 - (a sum near 1).
        left = xp.cumsum(share[::-1])[::-1]
        ends = xp.ones(1, left.dtype), xp.zeros(1, left.dtype)
        values = xp.concatenate([ends[0], left[1:], ends[1]])
        return xp.interp(t, xp.linspace(0.0, 1.0, steps + 1, dtype=left.dtype), values)


def learned_keep(steps: Count) -> LearnedKeep:
    """The schedule before it has learned: 1 - t.

    Args:
      steps: T, at least 2; the bound is over these steps.

    Raises:
      ValueError: fewer steps.
    """
    if steps < 2:
        raise ConfigError(f"steps={steps}; expected at least 2: one has nothing to share")
    return LearnedKeep(np.zeros(int(steps)))
