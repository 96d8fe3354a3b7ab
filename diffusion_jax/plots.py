"""What a config makes of the noise levels, as pictures: the schedule, and which times are drawn."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from diffusion_jax.diffusion import likelihood
from diffusion_jax.visual import Bars, Curve, Panel, curve_plot

Picture = UInt8[np.ndarray, "height width 3"]
_POINTS = 1024
_QUANTILES = 2**16
_BINS = 60
# Nats of logsnr beyond which nothing is drawn; schedules end at infinity.
_WIDEST = 30.0
_LINEAR_UP_TO = 3.0
"""A noise factor that grows beyond this is drawn on a logarithmic axis."""


def schedule_plot(process: Any, schedule: Any) -> Picture | None:
    """alpha, sigma and logsnr over t; of a process without them, the share that is kept.

    Args:
        process: a `diffusion.processes.Process`.
        schedule: of a Gaussian process, else None.

    Returns:
        uint8 RGB, or None for a process that has nothing to show.
    """
    t = np.linspace(0.0, 1.0, _POINTS + 1)
    if schedule is None:
        keep = getattr(process, "keep", None)
        if keep is None:
            return None
        kept = Curve(x=t, y=_values(keep(t), t))
        return curve_plot([Panel(title="probability to be kept", x_label="t", curves=(kept,))])
    alpha, sigma = _values(schedule.alpha(t), t), _values(schedule.sigma(t), t)
    with np.errstate(divide="ignore"):
        logsnr = _values(schedule.logsnr(t), t)
    factors = (Curve(x=t, y=alpha, label="alpha"), Curve(x=t, y=sigma, label="sigma"))
    large = float(sigma.max()) > _LINEAR_UP_TO
    panels = [
        Panel(title="x_t = alpha x_0 + sigma eps", x_label="t", curves=factors, log=large),
        Panel(
            title="logsnr = 2 log(alpha / sigma)",
            x_label="t",
            curves=(Curve(x=t, y=_within(logsnr)),),
            x_range=(0.0, 1.0),
        ),
    ]
    return curve_plot(panels)


def time_plot(objective: Any, schedule: Any) -> Picture | None:
    """The density of the times that training draws, of their logsnr, and the weight of each.

    Args:
        objective: with `sample_time`, as `Denoising`, or with the `times` of steps that are drawn
            alike, as `Variational`.
        schedule: of a Gaussian process, else None.

    Returns:
        uint8 RGB, or None for an objective that draws no times.
    """
    u = (np.arange(_QUANTILES, dtype=np.float32) + 0.5) / _QUANTILES
    steps = getattr(objective, "times", None)
    if hasattr(objective, "sample_time"):
        # The quantile function at evenly spaced places: the density without the noise of draws.
        t = np.asarray(objective.sample_time(u, np.zeros_like(u), 1), np.float64)
        t = t[np.isfinite(t)]
        over_t = _histogram(t, _BINS, (min(0.0, t.min()), max(1.0, t.max())))
    elif steps is not None:
        t = np.asarray(likelihood.random_step(steps, jnp.asarray(u))[0], np.float64)
        edges = np.sort(np.asarray(steps, np.float64))
        over_t = Bars(edges=edges, heights=1.0 / (np.diff(edges) * (len(edges) - 1)))
    else:
        return None
    adapted = getattr(objective, "adaptive", None) is not None
    note = "t (at the start; the draws follow the loss)" if adapted else "t"
    panels = [Panel(title="density of the times drawn", x_label=note, bars=over_t)]
    if schedule is not None:
        panels += _over_logsnr(t, objective, schedule, None if steps is None else len(steps) - 1)
    return curve_plot(panels)


def _over_logsnr(
    t: Float[np.ndarray, " n"], objective: Any, schedule: Any, steps: int | None
) -> list[Panel]:
    with np.errstate(divide="ignore"):
        logsnr = _within(_values(schedule.logsnr(t), t))
    logsnr = logsnr[np.isfinite(logsnr)]
    # Without the thin tails, which would squeeze everything else together.
    inside = np.quantile(logsnr, (0.0005, 0.9995))
    logsnr = logsnr[(logsnr >= inside[0]) & (logsnr <= inside[1])]
    drawn = _histogram(logsnr, min(_BINS, max(8, (steps or _BINS) // 2)))
    weigh = getattr(objective, "weight", None)
    label = "logsnr"
    if weigh is None:
        return [Panel(title="density over logsnr", x_label=label, bars=drawn)]
    centres = 0.5 * (drawn.edges[1:] + drawn.edges[:-1])
    weight = _weights(weigh, schedule, centres)
    product = np.where(np.isfinite(weight), weight, 0.0) * drawn.heights
    area = float(np.sum(product * np.diff(drawn.edges)))
    effective = Curve(x=centres, y=product / (area or 1.0), label="drawn x weight, area 1")
    bars = Bars(edges=drawn.edges, heights=drawn.heights, label="drawn")
    positive = weight[np.isfinite(weight) & (weight > 0.0)]
    uneven = len(positive) > 0 and float(positive.max()) > 30.0 * float(positive.min())
    return [
        Panel(title="density over logsnr", x_label=label, bars=bars, curves=(effective,)),
        Panel(
            title=f"weight on the squared error of {objective.prediction}",
            x_label=label,
            curves=(Curve(x=centres, y=weight),),
            log=uneven,
        ),
    ]


def _weights(weigh: Any, schedule: Any, logsnr: np.ndarray) -> Float[np.ndarray, " n"]:
    t = schedule.t_from_logsnr(logsnr)
    with np.errstate(all="ignore"):
        return _values(weigh(schedule.alpha(t), schedule.sigma(t)), logsnr)


def _histogram(values: np.ndarray, bins: int, ends: tuple[float, float] | None = None) -> Bars:
    heights, edges = np.histogram(values, bins=bins, range=ends, density=True)
    return Bars(edges=edges, heights=heights)


def _values(values: Any, like: np.ndarray) -> Float[np.ndarray, " n"]:
    """As float64, and as many as there are points: a constant comes as one number."""
    return np.broadcast_to(np.asarray(values, np.float64), like.shape)


def _within(logsnr: np.ndarray) -> np.ndarray:
    return np.where(np.abs(logsnr) <= _WIDEST, logsnr, np.nan)
