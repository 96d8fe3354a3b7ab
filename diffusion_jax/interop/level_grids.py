"""From the noise levels of a diffusers scheduler to times of our schedules."""

from __future__ import annotations

from typing import Any

import numpy as np

from diffusion_jax.diffusion.schedule_base import Schedule
from diffusion_jax.errors import ConfigError
from diffusion_jax.interop.scheduler_config import SchedulerConfig

# Single-precision levels that differ by less than this are one level.
_SAME = 1e-6

# A step as short as this changes a state by less than its rounding, noise included.
_NUDGE = 1e-12


def vp_levels(levels: Any) -> tuple[np.ndarray, np.ndarray]:
    """(alpha, sigma) with alpha^2 + sigma^2 = 1 and sigma / alpha as given."""
    levels = np.asarray(levels, np.float64)
    alphas = 1.0 / np.sqrt(1.0 + levels**2)
    return alphas, levels * alphas


def ve_levels(levels: Any) -> tuple[np.ndarray, np.ndarray]:
    """(alpha, sigma) with alpha = 1."""
    levels = np.asarray(levels, np.float64)
    return np.ones_like(levels), levels


def flow_levels(levels: Any) -> tuple[np.ndarray, np.ndarray]:
    """(alpha, sigma) with alpha + sigma = 1 and sigma as given."""
    levels = np.asarray(levels, np.float64)
    return 1.0 - levels, levels


def shift_levels(levels: Any, shift: float) -> Any:
    """Levels of a flow whose noise-to-signal ratios are multiplied by `shift`."""
    return shift * levels / (1.0 + (shift - 1.0) * levels)


def times_at(
    config: SchedulerConfig, schedule: Schedule, alphas: np.ndarray, sigmas: np.ndarray
) -> np.ndarray:
    """The times at which the schedule has these levels of signal and noise.

    Raises:
      ConfigError: a level noisier than the schedule at t = 1.
    """
    with np.errstate(divide="ignore"):
        times = np.asarray(schedule.t_from_logsnr(2.0 * (np.log(alphas) - np.log(sigmas))))
        most = float(np.exp(-0.5 * schedule.logsnr(1.0)))
        noisier = sigmas / alphas > most * (1.0 + 1e-5)
    if noisier.any():
        level = (sigmas / np.where(alphas > 0.0, alphas, 1e-300))[noisier][0]
        raise ConfigError(
            f"{config.class_name}: sigma={level:g} is noisier than the noisiest training step; "
            f"expected sigma_max or sigmas of at most {most:g}"
        )
    return np.clip(np.where(sigmas > 0.0, times, 0.0), 0.0, 1.0)


def falling(config: SchedulerConfig, levels: Any) -> np.ndarray:
    """`levels` in float64, a last one that repeats the one before being made a little lower.

    diffusers ends some grids with the last level once more: a step that changes nothing.

    Raises:
      ConfigError: a last level above the one before it, where diffusers steps up.
    """
    levels = np.array(levels, np.float64)
    before, last = levels[-2:]
    if last > before * (1.0 + _SAME):
        expected = f"'zero': {last:.6g} lies above the level before it, {before:.6g}"
        raise config.refuse_argument("final_sigmas_type", config["final_sigmas_type"], expected)
    if last > 0.0 and last >= before * (1.0 - _SAME):
        levels[-1] = before * (1.0 - _NUDGE)
    return levels
