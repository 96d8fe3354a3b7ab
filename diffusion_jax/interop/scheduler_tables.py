"""The tables of diffusers' schedulers: cumulative products, timesteps and noise levels.

A published checkpoint was trained with single-precision tables, so that the rounding of betas and
of their products is part of its schedule; it is repeated here. Noise levels are sigma / alpha.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import betaincinv

from diffusion_jax.diffusion.beta_tables import Table, cosine_betas, table
from diffusion_jax.diffusion.broadcasting import Number
from diffusion_jax.errors import ConfigError
from diffusion_jax.interop.scheduler_config import SchedulerConfig

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")

# What stands for the squared signal factor 0 where a scheduler divides by it.
_ALMOST_ZERO = 2.0**-24


def alphabars(config: SchedulerConfig) -> np.ndarray:
    """[T], cumulative products of 1 - beta, each rounded to single precision."""
    return _products(betas_of(config))


def almost_zero(products: np.ndarray, config: SchedulerConfig) -> np.ndarray:
    """`alphabars`, the last of them 2^-24 where zero terminal SNR is asked for."""
    if not config.get("rescale_betas_zero_snr"):
        return products
    return np.append(products[:-1], np.float32(_ALMOST_ZERO))


def as_table(products: np.ndarray) -> Table:
    """The schedule with these squared signal factors at t = (i + 1) / T."""
    products = np.asarray(products, np.float64)
    # With almost zero at the end, entries before may be noisier than that: no grid stays there.
    size = len(products)
    least = products[-1] * (1.0 + 1e-6 * np.arange(size)[::-1])
    products = np.maximum(products, least)
    return table(1.0 - products / np.concatenate([[1.0], products[:-1]]))


def level_of(products: np.ndarray) -> np.ndarray:
    """sigma / alpha in single precision."""
    return ((np.float32(1.0) - products) / products) ** np.float32(0.5)


def betas_of(config: SchedulerConfig) -> np.ndarray:
    """[T], betas in single precision."""
    betas = _plain_betas(config)
    lost = _products(betas) == 0.0
    if lost.any():
        first = int(lost.argmax())
        raise ConfigError(
            f"{config.class_name}: alpha is 0 from timestep {first} on; expected a "
            "lower beta_end, beta_start or trained_betas"
        )
    return _zero_terminal(betas) if config.get("rescale_betas_zero_snr") else betas


def _plain_betas(config: SchedulerConfig) -> np.ndarray:
    count = config.size
    if config.get("trained_betas") is not None:
        return _trained_betas(config, count)
    names = {
        "DDPMScheduler": (*BETA_SCHEDULES, "laplace", "sigmoid"),
        "HeunDiscreteScheduler": (*BETA_SCHEDULES, "exp"),
        "UnCLIPScheduler": ("squaredcos_cap_v2",),
    }.get(config.class_name, BETA_SCHEDULES)
    name = config.choose("beta_schedule", names)
    if name == "squaredcos_cap_v2":
        return cosine_betas(count).astype(np.float32)
    if name in ("laplace", "exp"):
        return _decaying(name, count)
    start, end = (config.number(f, above=0.0, below=1.0) for f in ("beta_start", "beta_end"))
    if name == "linear":
        return _spread(start, end, count)
    if name == "scaled_linear":
        return _spread(start**0.5, end**0.5, count) ** 2
    logistic = np.float32(1.0) / (np.float32(1.0) + np.exp(-_spread(-6.0, 6.0, count)))
    return logistic * np.float32(end - start) + np.float32(start)


def _trained_betas(config: SchedulerConfig, count: int) -> np.ndarray:
    try:
        betas = np.asarray(config["trained_betas"], np.float32)
    except (TypeError, ValueError):
        betas = np.empty(0, np.float32)
    if betas.shape != (count,):
        raise ConfigError(
            f"{config.class_name}: trained_betas has {betas.size} entries; "
            f"num_train_timesteps={count}"
        )
    wrong = ~((betas > 0.0) & (betas < 1.0))
    if wrong.any():
        k = int(wrong.argmax())
        raise config.refuse_argument(f"trained_betas[{k}]", float(betas[k]), "above 0, below 1")
    return betas


def _decaying(name: str, count: int) -> np.ndarray:
    """Betas whose products follow a Laplace distribution's tail or exp(-12 t), none above 0.999."""
    times = np.arange(count + 1) / count
    if name == "exp":
        product = np.exp(-12.0 * times)
    else:
        offset = 0.5 - times
        logsnr = -0.5 * np.copysign(1.0, offset) * np.log(1.0 - 2.0 * np.abs(offset) + 1e-6)
        product = np.sqrt(1.0 / (1.0 + np.exp(-logsnr)))
    return np.minimum(1.0 - product[1:] / product[:-1], 0.999).astype(np.float32)


def _spread(start: float, end: float, count: int) -> np.ndarray:
    """Evenly spread single-precision numbers, each counted from the nearer end."""
    first, last = np.float32(start), np.float32(end)
    width = np.float64((last - first) / np.float32(max(count - 1, 1)))
    index = np.arange(count)
    # Product and sum are rounded once, as by processors that fuse them.
    rising, falling = np.float64(first) + width * index, np.float64(last) - width * index[::-1]
    return np.where(index < count // 2, rising, falling).astype(np.float32)


def _products(betas: np.ndarray) -> np.ndarray:
    kept = (np.float32(1.0) - betas).astype(np.float64)
    return np.cumprod(kept).astype(np.float32)


def _zero_terminal(betas: np.ndarray) -> np.ndarray:
    """Lin et al. 2023, algorithm 1, in single precision."""
    alphas = np.sqrt(_products(betas))
    first, last = alphas[0], alphas[-1]
    products = ((alphas - last) * (first / (first - last))) ** 2
    return np.float32(1.0) - np.concatenate([products[:1], products[1:] / products[:-1]])


def karras(low: float, high: float, steps: int, rho: float = 7.0) -> np.ndarray:
    """Levels from high to low, equally spaced in their power 1 / rho."""
    ramp = np.linspace(0, 1, steps)
    return (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho


def exponential(low: Number, high: Number, steps: int) -> np.ndarray:
    """Levels from high to low, equally spaced in their logarithm."""
    return np.exp(np.linspace(np.log(high), np.log(low), steps))


def beta_distributed(low: float, high: float, steps: int) -> np.ndarray:
    """Levels from high to low at the quantiles of a beta distribution (Lee et al. 2024)."""
    return low + betaincinv(0.6, 0.6, 1.0 - np.linspace(0, 1, steps)) * (high - low)


def respaced(config: SchedulerConfig, levels: np.ndarray, steps: int) -> np.ndarray | None:
    """Levels between the ends of `levels`, highest first, as the config asks; None if it does not.

    `sigma_min` and `sigma_max` of the config, where the class has them, are the ends instead.
    """
    asked = [name for name in ("karras", "exponential", "beta") if config[f"use_{name}_sigmas"]]
    if len(asked) > 1:
        raise config.refuse(f"use_{asked[1]}_sigmas", [f"False beside use_{asked[0]}_sigmas"])
    if not asked:
        return None
    low, high = float(levels[-1]), float(levels[0])
    if config.get("sigma_min") is not None:
        low = config.number("sigma_min", above=0.0)
    if config.get("sigma_max") is not None:
        high = config.number("sigma_max", above=low)
    spread = {"karras": karras, "exponential": exponential, "beta": beta_distributed}[asked[0]]
    return spread(low, high, steps)


def timestep_of(levels: Any, log_table: np.ndarray) -> np.ndarray:
    """Timesteps, fractional, at which a table of log levels, rising, has these levels.

    Some are truncated to whole ones afterwards, so that the rounding counts: the gaps of the table
    are in its own precision.
    """
    logs = np.log(np.maximum(levels, 1e-10))
    low = np.clip(np.searchsorted(log_table, logs, "right") - 1, 0, len(log_table) - 2)
    share = (log_table[low] - logs) / (log_table[low] - log_table[low + 1])
    share = np.clip(share, 0.0, 1.0)
    return (1.0 - share) * low + share * (low + 1)
