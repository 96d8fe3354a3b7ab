"""What a scheduler config means in our terms."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_jax.diffusion.predictions import preconditioning
from diffusion_jax.diffusion.schedule_base import Schedule
from diffusion_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SchedulerPlan:
    """A sampling loop: N steps of a solver with n evaluations of the network.

    States are ours, alpha x0 + sigma eps; `sample_scale` turns them into the samples of diffusers,
    some of whose classes keep x0 + (sigma / alpha) eps.
    """

    scheduler: str
    """Class name."""
    schedule: Schedule
    times: np.ndarray
    """[N + 1], falling."""
    solver: str
    """Name in `solvers.SOLVERS`."""
    options: Mapping[str, Any]
    """Keywords of the solver."""
    timesteps: np.ndarray
    """[n], what the network is told: float64, whole where the class has whole timesteps."""
    alphas: np.ndarray
    """[n], signal factor by which the output of an evaluation is read."""
    sigmas: np.ndarray
    """[n], noise factor by which it is read; need not be that of `timesteps`, which are rounded."""
    prediction: str
    """One of `predictions.PREDICTIONS`."""
    initial_scale: float
    """Standard deviation of the first state."""
    draws: tuple[int, ...]
    """[N], draws of noise that diffusers makes in each step, also where it then multiplies by 0."""
    noised: tuple[np.ndarray, np.ndarray, np.ndarray]
    """Timesteps [m], alphas [m], sigmas [m] that noise can be added at."""
    keeps_variance: bool = True
    """False where diffusers' samples are x0 + (sigma / alpha) eps."""
    integer_timesteps: bool = True
    learned_variance: bool = False
    """The output has twice the channels; of the second half only `ddpm` makes use."""
    flipped: bool = False
    """The network's output is minus the prediction."""
    sigma_data: float = 0.5
    """For the prediction "edm"."""
    clip: float | None = None
    """x0 is clipped to +- this."""
    threshold: tuple[float, float] | None = None
    """Quantile and greatest limit of dynamic thresholding."""

    @property
    def input_scales(self) -> np.ndarray:
        """[n], what the network's input is in units of our state."""
        if self.prediction != "edm":
            return np.ones_like(self.alphas)
        return np.asarray(preconditioning(self.alphas, self.sigmas, self.sigma_data).c_in)

    def sample_scale(self, alpha: Any) -> Any:
        """What our states at this alpha are multiplied with to be samples of diffusers."""
        return 1.0 if self.keeps_variance else 1.0 / alpha

    def noise_levels(self, timesteps: Any) -> tuple[np.ndarray, np.ndarray]:
        """(alpha, sigma) at which diffusers' `add_noise` puts each of these timesteps, [B] each.

        Raises:
          ConfigError: a timestep that is none of the scheduler's.
        """
        known, alphas, sigmas = self.noised
        chosen = []
        for timestep in np.atleast_1d(np.asarray(timesteps, np.float64)):
            nearest = known[np.abs(known - timestep).argmin()]
            # Single-precision timesteps of other libraries are those of ours to rounding.
            if abs(nearest - timestep) > 1e-3:
                raise ConfigError(
                    f"timestep={timestep:g} is none of {self.scheduler}'s; the nearest is "
                    f"{nearest:g}"
                )
            # Of levels whose timesteps were rounded to one, diffusers takes the second.
            chosen.append(np.flatnonzero(known == nearest)[:2][-1])
        return alphas[chosen], sigmas[chosen]
