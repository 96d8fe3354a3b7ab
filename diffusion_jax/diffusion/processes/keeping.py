"""How long tokens are kept: keep(t), the probability that a token is still itself at time t.

    linear:  keep(t) = 1 - t                   (D3PM's absorbing schedule 1/(T - i + 1), Austin et
                                                al. 2021, section 3.1; "log-linear" of SEDD, MDLM)
    cosine:  keep(t) = 1 - sin(pi t / 2)       (MaskGIT, Chang et al. 2022; MDLM, appendix E)

Both are exactly 1 at t=0 and 0 at t=1. Functions take NumPy or JAX, and give the same kind.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from diffusion_jax.diffusion.broadcasting import namespace


@runtime_checkable
class Keep(Protocol):
    """A schedule of tokens; falls strictly from 1 at t=0 to 0 at t=1."""

    def keep(self, t: Any) -> Any:
        """Probability that a token is kept up to t."""
        ...

    def erased(self, t: Any) -> Any:
        """1 - keep(t), accurate near t=0."""
        ...

    def rate(self, t: Any) -> Any:
        """-keep'(t) / (1 - keep(t)), the derivative of log erased(t); infinite at t=0."""
        ...


@dataclass(frozen=True)
class LinearKeep:
    """keep(t) = 1 - t: as many tokens are erased in every stretch of time."""

    def keep(self, t: Any) -> Any:
        return 1.0 - t

    def erased(self, t: Any) -> Any:
        return 1.0 * t

    def rate(self, t: Any) -> Any:
        return 1.0 / t


@dataclass(frozen=True)
class CosineKeep:
    """keep(t) = 1 - sin(pi t / 2): sampling reveals few tokens at first and many at the end."""

    def keep(self, t: Any) -> Any:
        xp = namespace(t)
        # The second form keeps its accuracy near t=1, where the first cancels.
        late = 2.0 * xp.sin(0.25 * math.pi * (1.0 - t)) ** 2
        return xp.where(t < 0.5, 1.0 - xp.sin(0.5 * math.pi * t), late)

    def erased(self, t: Any) -> Any:
        return namespace(t).sin(0.5 * math.pi * t)

    def rate(self, t: Any) -> Any:
        return 0.5 * math.pi / namespace(t).tan(0.5 * math.pi * t)


KEEPS: Mapping[str, Keep] = types.MappingProxyType({"linear": LinearKeep(), "cosine": CosineKeep()})
"""Name -> schedule."""


def check_keep(keep: Keep) -> None:
    """Raises ValueError unless keep is 1 at t=0 and 0 at t=1, as the priors of tokens need."""
    first, last = float(keep.keep(0.0)), float(keep.keep(1.0))
    if (first, last) != (1.0, 0.0):
        raise ValueError(f"keep={keep!r} goes from {first} to {last}; expected from 1 to 0")
