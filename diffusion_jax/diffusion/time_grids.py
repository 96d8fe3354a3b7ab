"""Time grids: the decreasing times at which a sampler calls its denoiser.

Every grid is a NumPy float64 array of steps + 1 times in [0, 1]; a solver goes from the first to
the last and never evaluates the denoiser at the last. Grids computed from noise levels take the
schedule and mean by sigma the ratio sigma(t)/alpha(t), the noise level of Karras et al. 2022.
`shifted` and `terminal_shifted` move the times of another grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Array, Float
from scipy.special import betaincinv

from diffusion_jax.diffusion.broadcasting import Count, Number
from diffusion_jax.diffusion.schedule_base import Schedule
from diffusion_jax.errors import ConfigError

Times = Float[np.ndarray, " steps_plus_1"]
GivenTimes = Sequence[Number] | np.ndarray | Array


def check_times(times: GivenTimes) -> np.ndarray:
    """`times` as float64, or ConfigError unless they decrease strictly within [0, 1]."""
    grid = np.asarray(times, np.float64)
    if grid.ndim != 1 or len(grid) < 2:
        raise ConfigError(f"times has shape {grid.shape}; expected [steps + 1] with steps >= 1")
    outside = ~((grid >= 0.0) & (grid <= 1.0))
    if outside.any():
        k = int(np.argmax(outside))
        raise ConfigError(f"times[{k}]={grid[k]} lies outside [0, 1]")
    rising = np.diff(grid) >= 0.0
    if rising.any():
        k = int(np.argmax(rising)) + 1
        raise ConfigError(
            f"times[{k}]={grid[k]} does not lie below times[{k - 1}]={grid[k - 1]};"
            " expected strictly decreasing times"
        )
    return grid


def _check_steps(steps: Count, most: Count | None = None) -> None:
    if steps < 1 or (most is not None and steps > most):
        expected = "at least 1" if most is None else f"between 1 and {most}"
        raise ConfigError(f"steps={steps}; expected {expected}")


def uniform(steps: Count, start: Number = 1.0, end: Number = 0.0) -> Times:
    """Equal steps in t from `start` down to `end`."""
    _check_steps(steps)
    return check_times(np.linspace(float(start), float(end), steps + 1))


def uniform_logsnr(schedule: Schedule, steps: Count, t_start: Number, t_end: Number) -> Times:
    """Equal steps in log(alpha^2/sigma^2), which must be finite at both ends.

    Raises ConfigError where it is not, as at t=0, or at t=1 of a schedule with alpha(1)=0.
    """
    _check_steps(steps)
    ends = check_times((t_start, t_end))
    first, last = (float(schedule.logsnr(np.float64(t))) for t in (t_start, t_end))
    for name, t, value in (("t_start", t_start, first), ("t_end", t_end, last)):
        if not np.isfinite(value):
            raise ConfigError(f"{name}={t} has logsnr {value}; expected a time with a finite one")
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
    t=0, as in the paper; without, steps + 1 levels. Raises ConfigError for levels out of reach.
    """
    if rho <= 0.0:
        raise ConfigError(f"rho={rho}; expected a positive number")
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


def lu_lambdas(
    schedule: Schedule,
    steps: Count,
    sigma_min: Number,
    sigma_max: Number,
    *,
    final_zero: bool = True,
) -> Times:
    """Equal steps in lambda = log(alpha/sigma) (Lu et al. 2022, "DPM-Solver", section 3.3).

    With the ends given as noise levels it is `exponential`: lambda is -log(sigma/alpha). Published
    samplers offer both under their own names; same arguments.
    """
    return exponential(schedule, steps, sigma_min, sigma_max, final_zero=final_zero)


def beta(
    schedule: Schedule,
    steps: Count,
    sigma_min: Number,
    sigma_max: Number,
    *,
    a: Number = 0.6,
    b: Number = 0.6,
    final_zero: bool = True,
) -> Times:
    """Quantiles of a Beta(a, b) distribution stretched over the noise levels, then t=0.

    Level i of n is sigma_min + (sigma_max - sigma_min) F^-1(1 - i/(n - 1)), F the distribution
    function: a, b < 1 spend the steps at both ends. Lee et al. 2024, "Beta Sampling is All You
    Need", who draw times; published samplers do so with noise levels, in this way. `final_zero` and
    errors as of `karras`; ConfigError also for a or b that is not positive.
    """
    for name, value in (("a", a), ("b", b)):
        if not value > 0.0:
            raise ConfigError(f"{name}={value}; expected a positive number")
    levels = steps if final_zero else steps + 1
    sigma_min, sigma_max = _reachable(schedule, steps, sigma_min, sigma_max)
    quantiles = betaincinv(float(a), float(b), np.linspace(1.0, 0.0, levels))
    return _from_sigmas(schedule, sigma_min + (sigma_max - sigma_min) * quantiles, final_zero)


def given_sigmas(schedule: Schedule, sigmas: GivenTimes) -> Times:
    """The times of the caller's own noise levels sigma/alpha [steps + 1], strictly decreasing.

    The last may be 0, for t=0. With rectified flow the levels of most lists are times already:
    `given` takes those.

    Raises ConfigError for levels that are negative, do not decrease, or are out of reach.
    """
    levels = np.asarray(sigmas, np.float64)
    if levels.ndim != 1 or len(levels) < 2:
        raise ConfigError(f"sigmas has shape {levels.shape}; expected [steps + 1] with steps >= 1")
    bad = ~np.append(np.diff(levels) < 0.0, True) | ~(levels >= 0.0)
    if bad.any():
        k = int(np.argmax(bad))
        raise ConfigError(f"sigmas[{k}]={levels[k]}; expected levels that decrease, none below 0")
    if levels[0] > (top := _noisiest(schedule)) * (1.0 + 1e-6):
        raise ConfigError(
            f"sigmas[0]={levels[0]} is noisier than this schedule at t=1; the most is {top:.6g}"
        )
    final_zero = bool(levels[-1] == 0.0)
    return _from_sigmas(schedule, levels[:-1] if final_zero else levels, final_zero)


def _reachable(
    schedule: Schedule, steps: Count, sigma_min: Number, sigma_max: Number
) -> tuple[float, float]:
    """The checked (sigma_min, sigma_max)."""
    _check_steps(steps)
    if not 0.0 < sigma_min < sigma_max:
        raise ConfigError(
            f"sigma_min={sigma_min}, sigma_max={sigma_max}; expected 0 < sigma_min < sigma_max"
        )
    # One part in a million is rounding of the same level, as in sigma(1)=80 against 80.
    top = _noisiest(schedule)
    if sigma_max > top * (1.0 + 1e-6):
        raise ConfigError(
            f"sigma_max={sigma_max} is noisier than this schedule at t=1; the most is {top:.6g}"
        )
    return float(sigma_min), min(float(sigma_max), top)


def _noisiest(schedule: Schedule) -> float:
    """sigma/alpha at t=1, infinite where alpha is 0 there."""
    return float(np.exp(-0.5 * schedule.logsnr(np.float64(1.0))))


def _from_sigmas(schedule: Schedule, sigmas: np.ndarray, final_zero: bool) -> np.ndarray:
    times = np.asarray(schedule.t_from_logsnr(-2.0 * np.log(sigmas)), np.float64)
    times = np.clip(times, 0.0, 1.0)
    return check_times(np.append(times, 0.0) if final_zero else times)


def shifted(times: GivenTimes, shift: Number, *, power: Number = 1.0) -> Times:
    """shift / (shift + (1/t - 1)^power): the same steps spent at noisier times where shift > 1.

    With power 1 it is shift t / (1 + (shift - 1) t), Esser et al. 2024, equation 23: with rectified
    flow it multiplies sigma/alpha by `shift`, and for another power raises it to that first.
    """
    for name, value in (("shift", shift), ("power", power)):
        if not value > 0.0:
            raise ConfigError(f"{name}={value}; expected a positive number")
    grid = check_times(times)
    # By powers of t and 1 - t: both ends stay where they are without a division by zero.
    signal, noise = (1.0 - grid) ** float(power), shift * grid ** float(power)
    return check_times(noise / (noise + signal))


def resolution_shift(size: Number, base_size: Number) -> float:
    """The shift sqrt(size / base_size) of a model of `base_size` pixels or tokens at `size`.

    Esser et al. 2024, equation 23: it leaves the uncertainty of a constant image as it was.
    """
    for name, value in (("size", size), ("base_size", base_size)):
        if not value > 0.0:
            raise ConfigError(f"{name}={value}; expected a positive number")
    return float(np.sqrt(size / base_size))


def dynamic_shift(
    tokens: Number,
    *,
    base_tokens: Number = 256,
    max_tokens: Number = 4096,
    base_shift: Number = 0.5,
    max_shift: Number = 1.15,
) -> float:
    """The shift e^mu, mu on the line from (base_tokens, base_shift) to (max_tokens, max_shift).

    The resolution-dependent shift of FLUX.1, whose numbers are the defaults; `tokens` is the number
    of patches of the picture, and may lie beyond both ends.
    """
    if not 0.0 < base_tokens < max_tokens:
        raise ConfigError(
            f"base_tokens={base_tokens}, max_tokens={max_tokens}; "
            "expected 0 < base_tokens < max_tokens"
        )
    if not tokens > 0.0:
        raise ConfigError(f"tokens={tokens}; expected a positive number")
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return float(np.exp(base_shift + slope * (tokens - base_tokens)))


def terminal_shifted(times: GivenTimes, terminal: Number) -> Times:
    """The times stretched away from 1, so that the last call of the denoiser is at `terminal`.

    1 - (1 - t) (1 - terminal) / (1 - times[-2]), but for times[-1], where nothing is called (the
    option `shift_terminal` of LTX-Video and others). Raises ConfigError unless terminal lies
    between times[-1] and 1 and there are two steps at least.
    """
    grid = check_times(times)
    if not grid[-1] < terminal < 1.0:
        raise ConfigError(f"terminal={terminal}; expected a time between {grid[-1]} and 1")
    if len(grid) < 3:
        raise ConfigError(f"times has {len(grid)} entries; a terminal needs at least 3")
    called = 1.0 - (1.0 - grid[:-1]) * ((1.0 - terminal) / (1.0 - grid[-2]))
    return check_times(np.append(called, grid[-1]))


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


def given_timesteps(table_size: Count, timesteps: GivenTimes, *, final: Number = 0.0) -> Times:
    """The caller's own entries of a beta table, 0 the least noisy, strictly falling; then `final`.

    They need not be whole: entry i stands at t = (i + 1)/T. Raises ConfigError for entries outside
    0..T-1 or that do not decrease.
    """
    entries = np.asarray(timesteps, np.float64)
    if entries.ndim != 1 or not len(entries):
        raise ConfigError(f"timesteps has shape {entries.shape}; expected [steps] with steps >= 1")
    bad = ~((entries >= 0.0) & (entries <= table_size - 1)) | (
        np.diff(entries, prepend=np.inf) >= 0
    )
    if bad.any():
        k = int(np.argmax(bad))
        raise ConfigError(
            f"timesteps[{k}]={entries[k]}; expected falling numbers from {table_size - 1} to 0"
        )
    return _from_entries(entries, table_size, final)


def given(times: GivenTimes) -> Times:
    """The caller's own times, checked: strictly decreasing within [0, 1]."""
    return check_times(times)


TIME_GRIDS: dict[str, Callable[..., np.ndarray]] = {
    "uniform": uniform,
    "uniform_logsnr": uniform_logsnr,
    "karras": karras,
    "exponential": exponential,
    "lu_lambdas": lu_lambdas,
    "beta": beta,
    "shifted": shifted,
    "terminal_shifted": terminal_shifted,
    "leading": leading,
    "linspace": linspace,
    "trailing": trailing,
    "given": given,
    "given_sigmas": given_sigmas,
    "given_timesteps": given_timesteps,
}
