"""How a deterministic step is made stochastic without changing the marginals.

Churn adds noise before it, from u = sigma/alpha up to u_hat = (1 + gamma) u (Karras et al. 2022,
algorithm 2). An ancestral step goes lower, to u_down, and comes back by adding noise of u_up after
it, u_down^2 + u_up^2 = u_s^2 (k-diffusion's `get_ancestral_step`; Song et al. 2021, equation 16).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array

from diffusion_jax.diffusion.schedule_base import Schedule
from diffusion_jax.diffusion.solvers import stepping
from diffusion_jax.diffusion.solvers.stepping import Draws, Steps
from diffusion_jax.errors import ConfigError

# Karras et al. 2022, section 4: no step may add more noise than the image holds.
MOST_GAMMA = math.sqrt(2.0) - 1.0


class Noising(NamedTuple):
    """The levels of the deterministic steps, and what goes before and after, each [steps]."""

    steps: Steps
    scale: Any
    """What multiplies the state before a step."""
    std: Any
    """The noise added to it before the step."""
    end_scale: Any
    """What multiplies the state after a step."""
    end_std: Any
    """The noise added to it after the step."""

    def draws(self, solver: str, x: Array, key: Any, noise: Any) -> Draws:
        """The noise of all steps, one draw each."""
        added = self.std + self.end_std > 0.0
        return stepping.draws(solver, x, len(self.steps.t), key, noise, added)

    def around(self, update: Callable, x: Array, draws: Draws | None) -> tuple[Callable, Any]:
        """`update` with the noise around it, and the rows to be zipped with its own."""
        if draws is None:
            return (lambda x, history, row: update(x, history, row[0])), None

        def noisy(x: Array, history: Any, row: Any) -> Any:
            inner, ((scale, std, end_scale, end_std), drawn) = row
            z = draws.draw(drawn, x.shape, x.dtype)
            x, history = update(scale * x + std * z, history, inner)
            return end_scale * x + end_std * z, history

        levels = stepping.cast(x, self.scale, self.std, self.end_scale, self.end_std)
        return noisy, (levels, draws.rows(len(self.steps.t)))


def quiet(steps: Steps) -> Noising:
    """No noise."""
    one, zero = steps.xp.ones_like(steps.sigma_t), steps.xp.zeros_like(steps.sigma_t)
    return Noising(steps, one, zero, one, zero)


def check_churn(s_churn: Any, s_tmin: Any, s_tmax: Any, s_noise: Any) -> None:
    """Raises ConfigError for options of churn out of their ranges."""
    if not 0.0 <= s_churn < math.inf:
        raise ConfigError(f"s_churn={s_churn}; expected a number from 0 (no churn) up")
    if not 0.0 <= s_tmin <= s_tmax:
        raise ConfigError(f"s_tmin={s_tmin}, s_tmax={s_tmax}; expected 0 <= s_tmin <= s_tmax")
    check_noise(s_noise)


def check_noise(s_noise: Any) -> None:
    """Raises ConfigError unless the factor of the noise is a number from 0 up."""
    if not 0.0 <= s_noise < math.inf:
        raise ConfigError(f"s_noise={s_noise}; expected a number from 0 up (1 is exact)")


def check_eta(eta: Any) -> None:
    """Raises ConfigError for an eta outside [0, 1]."""
    if not 0.0 <= eta <= 1.0:
        raise ConfigError(f"eta={eta}; expected a number from 0 (deterministic) to 1 (ancestral)")


def churned(
    schedule: Schedule | None,
    steps: Steps,
    s_churn: Any,
    s_tmin: Any,
    s_tmax: Any,
    s_noise: Any,
) -> Noising:
    """Steps from the noisier levels u_hat = (1 + gamma) u of Karras et al. 2022, algorithm 2.

    gamma = min(s_churn/steps, sqrt(2) - 1) where s_tmin <= u <= s_tmax, else 0; at alpha = 0 it is
    0, for there is nothing to add noise to. Without a schedule, for a solver that evaluates none of
    the levels, u_hat stands at the same t and alpha; it is on no schedule then.

    Raises ConfigError for options out of range, or a u_hat that the schedule does not reach.
    """
    check_churn(s_churn, s_tmin, s_tmax, s_noise)
    if s_churn == 0.0:
        return quiet(steps)
    xp = steps.xp
    signal = steps.alpha_t > 0.0
    u = steps.sigma_t / xp.where(signal, steps.alpha_t, 1.0)
    churns = signal & (u >= s_tmin) & (u <= s_tmax)
    gamma = xp.where(churns, min(float(s_churn) / len(steps.t), MOST_GAMMA), 0.0)
    u_hat = (1.0 + gamma) * u
    if schedule is None:
        t, alpha, sigma = steps.t, steps.alpha_t, xp.where(signal, 1.0 + gamma, 1.0) * steps.sigma_t
    else:
        t = xp.where(churns, schedule.t_from_logsnr(-2.0 * xp.log(u_hat)), steps.t)
        alpha = xp.where(churns, schedule.alpha(t), steps.alpha_t)
        sigma = xp.where(churns, schedule.sigma(t), steps.sigma_t)
        _check_reached(steps, churns, alpha, sigma, u_hat, s_churn)
    std = float(s_noise) * alpha * u * xp.sqrt(gamma * (2.0 + gamma))
    scale = alpha / xp.where(signal, steps.alpha_t, 1.0)
    noisier = steps._replace(t=t, alpha_t=alpha, sigma_t=sigma)
    return quiet(noisier)._replace(scale=xp.where(churns, scale, 1.0), std=std)


def _check_reached(
    steps: Steps, churns: Any, alpha: Any, sigma: Any, u_hat: Any, s_churn: Any
) -> None:
    if steps.xp is not np:
        return
    short = churns & ~(np.abs(sigma - u_hat * alpha) <= 1e-6 * sigma)
    if short.any():
        k = int(np.argmax(short))
        raise ConfigError(
            f"s_churn={s_churn} raises sigma/alpha at times[{k}]={steps.t[k]:g} to {u_hat[k]:.6g}, "
            f"which this schedule does not reach: set s_tmax below {u_hat[k]:.6g}, or s_churn=0"
        )


def lowered(schedule: Schedule, steps: Steps, eta: Any, s_noise: Any) -> Noising:
    """Steps to the lower levels u_down, u_up = eta u_s sqrt(1 - (u_s/u_t)^2) being added after.

    eta=0 is deterministic; eta=1 adds the noise of DDPM with the small variance. A step to
    sigma_s = 0 is as it was; from alpha_t = 0 with eta=1 the lower level is that of the data.

    Raises ConfigError for eta outside [0, 1] or a negative s_noise.
    """
    check_eta(eta)
    check_noise(s_noise)
    if eta == 0.0:
        return quiet(steps)
    xp = steps.xp
    kept, std = ancestral_split(steps, eta, s_noise)
    noisy = steps.sigma_s > 0.0
    u_down = kept * steps.sigma_s / steps.alpha_s
    below = noisy & (u_down > 0.0)
    logsnr = -2.0 * xp.log(xp.where(below, u_down, 1.0))
    t = xp.where(below, schedule.t_from_logsnr(logsnr), xp.where(noisy, 0.0, steps.s))
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    lower = steps._replace(s=t, alpha_s=alpha, sigma_s=sigma)
    return quiet(lower)._replace(end_scale=steps.alpha_s / alpha, end_std=std)


def ancestral_split(steps: Steps, eta: Any, s_noise: Any) -> tuple[Any, Any]:
    """u_down/u_s, and the standard deviation alpha_s u_up of the noise, each [steps].

    (u_down/u_s)^2 = 1 - eta^2 (1 - e^-2h), written without its cancellation. For eta = 1 the root
    is e^-h itself, and has a derivative also where that is 0.
    """
    xp, eta = steps.xp, float(eta)
    kept = steps.decay
    if eta < 1.0:
        kept = xp.sqrt((1.0 - eta) * (1.0 + eta) + (eta * steps.decay) ** 2)
    return kept, float(s_noise) * eta * steps.sigma_s * xp.sqrt(steps.fresh)
