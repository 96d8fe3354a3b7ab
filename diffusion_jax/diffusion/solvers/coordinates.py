"""The coordinates in which the Runge-Kutta and linear multistep methods integrate.

With c either alpha or alpha + sigma, the probability-flow ODE in y = x/c over u = sigma/c is

    dy/du = (y - x0)/u = (x - c x0)/sigma,

which is eps for c = alpha (Karras et al. 2022, equation 4) and eps - x0, the velocity of a
rectified flow, for c = alpha + sigma. The latter stays finite where alpha = 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.diffusion.schedule_base import Schedule
from diffusion_jax.diffusion.solvers.stepping import Steps
from diffusion_jax.errors import ConfigError, unknown_name

COORDINATES = ("sigma", "flow")

# From a smaller alpha/sigma the first step would span nearly all of sigma/alpha, and the mean of
# the slopes at its ends be that of none between. EDM starts at 1/80, Stable Diffusion at 1/14.6.
LEAST_SNR_AMPLITUDE = 1e-3


class Inner(NamedTuple):
    """A level within each step, each [steps]."""

    t: Any
    c: Any
    to_slope: Any
    """1/sigma; 1 where sigma is 0."""


class Coordinates(NamedTuple):
    """x/c over u = sigma/c at the ends of all steps, each [steps]."""

    flow: Any
    """Whether c is alpha + sigma; one truth value for all steps, of JAX for a traced schedule."""
    c_t: Any
    c_s: Any
    u_t: Any
    u_s: Any

    def ends(self, steps: Steps) -> tuple[Any, Any, Any, Any]:
        """c at t and at s, 1/c_t and 1/sigma_t, each [steps]: on a CPU a division an element takes
        longer than all else that a step does."""
        return self.c_t, self.c_s, 1.0 / self.c_t, 1.0 / steps.sigma_t

    def inner(self, schedule: Schedule, xp: Any, u: Any) -> Inner:
        """The levels at u, [steps]; those with u = 0 are at t = 0 and never evaluated."""
        positive = u > 0.0
        u = xp.where(positive, u, 0.5)
        # sigma/alpha; the floor keeps a traced branch that is not taken finite.
        ratio = xp.where(self.flow, u / xp.maximum(1.0 - u, 1e-30), u)
        t = xp.where(positive, schedule.t_from_logsnr(-2.0 * xp.log(ratio)), 0.0)
        alpha: Any = schedule.alpha(t)
        sigma: Any = schedule.sigma(t)
        to_slope = 1.0 / xp.where(positive, sigma, 1.0)
        return Inner(t, alpha + xp.where(self.flow, sigma, 0.0), to_slope)


def coordinates_of(steps: Steps, name: str | None) -> Coordinates:
    """The coordinates called `name`; for None "flow" where times[0] has alpha < 1e-3 sigma.

    Raises ConfigError for an unknown name, or "sigma" where times[0] has alpha = 0.
    """
    xp = steps.xp
    if name is not None and name not in COORDINATES:
        raise ConfigError(unknown_name("coordinates", name, COORDINATES))
    if name is None:
        flow = steps.alpha_t[0] < LEAST_SNR_AMPLITUDE * steps.sigma_t[0]
    else:
        flow = xp.asarray(name == "flow")
    if name == "sigma" and xp is np and steps.alpha_t[0] <= 0.0:
        raise ConfigError(
            f"coordinates='sigma' divides by alpha, which is 0 at times[0]={steps.t[0]:g}: "
            "use 'flow', or a time grid that starts below"
        )
    return levels_of(steps, flow)


def levels_of(steps: Steps, flow: Any) -> Coordinates:
    """The ends of `steps` in the coordinates with `flow`."""
    xp = steps.xp
    c_t = steps.alpha_t + xp.where(flow, steps.sigma_t, 0.0)
    c_s = steps.alpha_s + xp.where(flow, steps.sigma_s, 0.0)
    return Coordinates(flow, c_t, c_s, steps.sigma_t / c_t, steps.sigma_s / c_s)
