"""How likelihoods are estimated: what a user may say of it, and what goes with what."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from diffusion_jax.diffusion import likelihood
from diffusion_jax.errors import ConfigError, unknown_name
from diffusion_jax.evaluation.pixel_levels import check_levels

METHODS = ("continuous", "discrete", "flow")
SPREADS = tuple(name for name in likelihood.SPREADS if name != "batch")
"""One number for a whole batch leaves no independent values, whose standard error is told."""
STEPS = 100
"""Of a grid, where neither the user nor what was learned says."""
_READ_BY = {
    "steps": ("discrete", "flow"),
    "draws": ("continuous", "flow"),
    "proposal": ("continuous",),
    "spread": ("continuous",),
    "trace": ("flow",),
    "probes": ("flow",),
    "solver": ("flow",),
    "rtol": ("flow",),
    "atol": ("flow",),
}
"""Which methods read an option that not all do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LikelihoodOptions:
    """How the likelihood is estimated.

    Attributes:
        method: "continuous", "discrete" or "flow".
        steps: of "discrete", equal in t, and "flow", equal in logsnr. None takes those that a
            learned schedule has, which belong to its bound as its betas do, and else 100.
        draws: noise levels an example ("continuous"), draws of the dequantising noise ("flow", with
            an exact trace).
        first_time: where the data stand in "continuous" and "flow", and images in "discrete"; None
            for that of a learned schedule or a table, and of others where the noise is a sixth of
            a pixel's step.
        levels: values of a pixel, in equal steps over the range of the data; None finds them in
            the data, 0 takes images for a density.
        proposal, spread: of "continuous": see `diffusion.likelihood.continuous`.
        trace, probes, solver: of "flow": see `diffusion.likelihood.flow`.
        rtol, atol: of the solver "dopri5", which chooses its own steps.
        seed: of all draws.
    """

    # Typed Any: what a user gives is judged below.
    method: Any = "continuous"
    steps: Any = None
    draws: Any = 1
    first_time: Any = None
    levels: Any = None
    proposal: Any = "gaussian"
    spread: Any = "stratified"
    trace: Any = "rademacher"
    probes: Any = 1
    solver: Any = "rk4"
    rtol: Any = 1e-5
    atol: Any = 1e-5
    seed: Any = 0

    def __post_init__(self) -> None:
        self._check_names()
        for name in ("steps", "draws", "probes"):
            value = getattr(self, name)
            if (name, value) != ("steps", None) and (not _is_whole(value) or value < 1):
                raise ConfigError(f"{name}={value!r}: expected a whole number, at least 1")
        if not _is_whole(self.seed) or not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed={self.seed!r}: expected a whole number, 0 <= seed < 2**32")
        check_levels(self.levels)
        first = self.first_time
        if first is not None and not (_is_number(first) and 0.0 < first < 1.0):
            raise ConfigError(f"first_time={first!r}: expected a time between 0 and 1")
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if not _is_number(value) or not 0.0 < value < 1.0:
                raise ConfigError(f"{name}={value!r}: expected a number between 0 and 1")
        for field in dataclasses.fields(self):
            readers, value = _READ_BY.get(field.name, METHODS), getattr(self, field.name)
            if self.method not in readers and value != field.default:
                raise ConfigError(
                    f"{field.name}={value!r}: not read by the method {self.method!r}; leave it, or "
                    f"choose {' or '.join(map(repr, readers))}"
                )
        self._check_flow()

    def _check_names(self) -> None:
        if self.spread == "batch":
            raise ConfigError(
                "spread='batch': the values of a batch depend on each other, and their standard "
                f"error is not known; expected {' or '.join(map(repr, SPREADS))}"
            )
        known = {
            "method": METHODS,
            "proposal": likelihood.PROPOSALS,
            "spread": SPREADS,
            "trace": likelihood.TRACES,
            "solver": likelihood.FLOW_METHODS,
        }
        for name, names in known.items():
            if getattr(self, name) not in tuple(names):
                raise ConfigError(unknown_name(name, getattr(self, name), names))

    def _check_flow(self) -> None:
        if self.trace == "exact" and self.probes > 1:
            raise ConfigError(f"probes={self.probes}: an exact trace draws none; expected 1")
        if self.method == "flow" and self.draws > 1 and self.trace != "exact":
            raise ConfigError(
                f"draws={self.draws}: the noise of trace={self.trace!r} would raise the mean of "
                "their probabilities; expected 1, or trace='exact'"
            )
        own = ("steps",) if self.solver == "dopri5" else ("rtol", "atol")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in own and value != field.default:
                other = "another solver" if field.name == "steps" else "solver='dopri5'"
                raise ConfigError(
                    f"{field.name}={value!r}: not read by solver={self.solver!r}; leave it, or "
                    f"choose {other}"
                )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or isinstance(value, float | np.floating)
