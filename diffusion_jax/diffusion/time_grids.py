"""Time grids: the decreasing times at which a sampler calls its denoiser.

Every grid is a NumPy float64 array of steps + 1 times in [0, 1]; a solver goes from the first to
the last and never evaluates the denoiser at the last. Grids computed from noise levels take the
schedule and mean by sigma the ratio sigma(t)/alpha(t), the noise level of Karras et al. 2022.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Array, Float

from diffusion_jax.diffusion.broadcasting import Count, Number
from diffusion_jax.diffusion.schedule_base import Schedule

Times = Float[np.ndarray, " steps_plus_1"]
GivenTimes = Sequence[Number] | np.ndarray | Array


def check_times(times: GivenTimes) -> np.ndarray:
    """`times` as float64, or ValueError unless they decrease strictly within [0, 1]."""
    grid = np.asarray(times, np.float64)
    if grid.ndim != 1 or len(grid) < 2:
        raise ValueError(f"times has shape {grid.shape}; expected [steps + 1] with steps >= 1")
    outside = ~((grid >= 0.0) & (grid <= 1.0))
    if outside.any():
        k = int(np.argmax(outside))
        raise ValueError(f"times[{k}]={grid[k]} lies outside [0, 1]")
    rising = np.diff(grid) >= 0.0
    if rising.any():
        k = int(np.argmax(rising)) + 1
        raise ValueError(
            f"times[{k}]={grid[k]} does not lie below times[{k - 1}]={grid[k - 1]};"
            " expected strictly decreasing times"
        )
    return grid


def _check_steps(steps: Count, most: Count | None = None) -> None:
    if steps < 1 or (most is not None and steps > most):
        expected = "at least 1" if most is None else f"between 1 and {most}"
        raise ValueError(f"steps={steps}; expected {expected}")


def uniform(steps: Count, start: Number = 1.0, end: Number = 0.0) -> Times:
    """Equal steps in t from `start` down to `end`."""
    _check_steps(steps)
    return check_times(np.linspace(float(start), float(end), steps + 1))


def uniform_logsnr(schedule: Schedule, steps: Count, t_start: Number, t_end: Number) -> Times:
    """Equal steps in log(alpha^2/sigma^2), which must be finite at both ends.

    Raises ValueError where it is not, as at t=0, or at t=1 of a schedule with alpha(1)=0.
    """
    _check_steps(steps)
    ends = check_times((t_start, t_end))
    first, last = (float(schedule.logsnr(np.float64(t))) for t in (t_start, t_end))
    for name, t, value in (("t_start", t_start, first), ("t_end", t_end, last)):
        if not np.isfinite(value):
            raise ValueError(f"{name}={t} has logsnr {value}; expected a time with a finite one")
    levels = np.linspace(first, last, steps + 1)
    inner = np.asarray(schedule.t_from_logsnr(levels[1:-1]), np.float64)
    return check_times(np.concatenate([ends[:1], inner, ends[1:]]))


def karras(
    schedule: Schedule,
    steps: Count,
    sigma_min: Number,
    sigma_max: Number,
    *,
    rho: Number = 7.0,
    final_zero: bool = True,
) -> Times:
    """Equal steps in sigma^(1/rho) (Karras et al. 2022, equation 5), then t=0 if `final_zero`.

    With `final_zero` there are `steps` levels from sigma_max to sigma_min and the last step goes to
    t=0, as in the paper; without, steps + 1 levels. Raises ValueError for levels out of reach.
    """
    if rho <= 0.0:
        raise ValueError(f"rho={rho}; expected a positive number")
    levels = steps if final_zero else steps + 1
    sigma_min, sigma_max = _reachable(schedule, steps, sigma_min, sigma_max)
    rho = float(rho)
    ramp = np.linspace(sigma_max ** (1.0 / rho), sigma_min ** (1.0 / rho), levels)
    return _from_sigmas(schedule, ramp**rho, final_zero)


def exponential(
    schedule: Schedule,
    steps: Count,
    sigma_min: Number,
    sigma_max: Number,
    *,
    final_zero: bool = True,
) -> Times:
    """Equal steps in log(sigma), the limit of `karras` for a large rho; same arguments."""
    levels = steps if final_zero else steps + 1
    sigma_min, sigma_max = _reachable(schedule, steps, sigma_min, sigma_max)
    return _from_sigmas(schedule, np.geomspace(sigma_max, sigma_min, levels), final_zero)


def _reachable(
    schedule: Schedule, steps: Count, sigma_min: Number, sigma_max: Number
) -> tuple[float, float]:
    """The checked (sigma_min, sigma_max)."""
    _check_steps(steps)
    if not 0.0 < sigma_min < sigma_max:
        raise ValueError(
            f"sigma_min={sigma_min}, sigma_max={sigma_max}; expected 0 < sigma_min < sigma_max"
        )
    # One part in a million is rounding of the same level, as in sigma(1)=80 against 80.
    top = float(np.exp(-0.5 * schedule.logsnr(np.float64(1.0))))
    if sigma_max > top * (1.0 + 1e-6):
        raise ValueError(
            f"sigma_max={sigma_max} is noisier than this schedule at t=1; the most is {top:.6g}"
        )
    return float(sigma_min), min(float(sigma_max), top)


def _from_sigmas(schedule: Schedule, sigmas: np.ndarray, final_zero: bool) -> np.ndarray:
    times = np.asarray(schedule.t_from_logsnr(-2.0 * np.log(sigmas)), np.float64)
    times = np.clip(times, 0.0, 1.0)
    return check_times(np.append(times, 0.0) if final_zero else times)


def shifted(times: GivenTimes, shift: Number) -> Times:
    """shift t / (1 + (shift - 1) t): the same steps spent at noisier times where shift > 1.

    Esser et al. 2024, equation 23: with rectified flow it multiplies sigma/alpha by `shift`.
    """
    if shift <= 0.0:
        raise ValueError(f"shift={shift}; expected a positive number")
    grid = check_times(times)
    return check_times(shift * grid / (1.0 + (shift - 1.0) * grid))


def leading(table_size: Count, steps: Count, *, offset: Count = 0, final: Number = 0.0) -> Times:
    """Every (table_size // steps)-th entry of a beta table from entry `offset`, then `final`.

    Entry i of a table of T betas stands at t = (i + 1)/T. The spacing of the DDIM paper's code; it
    leaves the noisiest entries out (Lin et al. 2024, table 2).
    """
    _check_steps(steps, table_size)
    entries = np.arange(steps)[::-1] * (table_size // steps) + offset
    return _from_entries(entries, table_size, final)


def linspace(
    table_size: Count, steps: Count, *, drop_last: bool = False, final: Number = 0.0
) -> Times:
    """Entries of a beta table spread evenly with both ends, rounded, then `final`.

    `drop_last` spreads steps + 1 entries and leaves entry 0 out, as DPM-Solver implementations do.
    """
    _check_steps(steps, table_size - 1 if drop_last else table_size)
    entries = np.linspace(0, table_size - 1, steps + drop_last).round()[::-1]
    return _from_entries(entries[:steps], table_size, final)


def trailing(table_size: Count, steps: Count, *, final: Number = 0.0) -> Times:
    """Entries of a beta table spread evenly from its noisiest, rounded, then `final`."""
    _check_steps(steps, table_size)
    entries = np.round(table_size - np.arange(steps) * (table_size / steps)) - 1.0
    return _from_entries(entries, table_size, final)


def _from_entries(entries: np.ndarray, table_size: Count, final: Number) -> np.ndarray:
    return check_times(np.append((entries + 1.0) / table_size, final))


def given(times: GivenTimes) -> Times:
    """The caller's own times, checked: strictly decreasing within [0, 1]."""
    return check_times(times)


TIME_GRIDS: dict[str, Callable[..., np.ndarray]] = {
    "uniform": uniform,
    "uniform_logsnr": uniform_logsnr,
    "karras": karras,
    "exponential": exponential,
    "shifted": shifted,
    "leading": leading,
    "linspace": linspace,
    "trailing": trailing,
    "given": given,
}
