"""UniPC (Zhao et al. 2023): a multistep predictor, and a corrector that costs no evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Array

from diffusion_jax.diffusion.broadcasting import Count
from diffusion_jax.diffusion.schedule_base import Schedule
from diffusion_jax.diffusion.solvers import stepping
from diffusion_jax.diffusion.solvers.exponential import begins
from diffusion_jax.diffusion.solvers.exponential_plans import Rules, check_order, check_type
from diffusion_jax.diffusion.solvers.exponential_run import run_corrected
from diffusion_jax.diffusion.solvers.stepping import Denoise, Noise, Result, Start
from diffusion_jax.errors import ConfigError

SOLVER_TYPES = ("bh1", "bh2")


def unipc(
    denoise: Denoise,
    schedule: Schedule,
    times: Any,
    x: Start,
    *,
    key: Array | None = None,
    noise: Noise | None = None,
    trajectory: bool = False,
    order: Count | None = None,
    solver_type: str = "bh2",
    predict_x0: bool = True,
    corrector: bool = True,
    corrected: bool = False,
    disable_corrector: Sequence[int] = (),
    lower_order_final: bool = False,
) -> Result:
    """UniPC of order 1, 2 (if None) or 3: UniP predicts x_s, and once the denoiser has seen it,
    UniC corrects it, by the polynomial that also goes through the new value.

    Zhao et al. 2023, "UniPC", algorithms 1 and 2 (and 5 to 8 for `predict_x0`, which integrates x0
    instead of eps = (x - alpha x0)/sigma). UniP is `dpmpp_3m`, corrected, or `dpmsolver`; UniC the
    implicit method of one order more. B(h) of `solver_type`, h for "bh1" or e^h - 1 for "bh2" (-h,
    e^-h - 1 for x0), matters where it stands alone: for UniP of order 2, with weight B(h)/2 on the
    difference, and for UniC of order 1. The states of the trajectory are the predicted ones, on
    which the denoiser is evaluated; the last is not corrected. One evaluation a step;
    deterministic, key and noise unused.

    `corrector=False` leaves UniP, whose order 3 is 2 by its first step of finite h unless that,
    with `corrected`, is corrected all the same; `disable_corrector` lists steps, from 0, whose
    result alone is not corrected. Start-up rule and `lower_order_final` as in `dpmpp_3m`; UniC has
    the order of its step. A step from alpha_t = 0 is corrected for x0 with bh2 only, for which
    e^-h = 0 is finite, and not with `corrector=False`.

    Raises ConfigError for another order or more than there are steps, an unknown solver_type, a
    number in disable_corrector that is not one of a step, or bad times.
    """
    del key, noise
    check_type(solver_type, SOLVER_TYPES)
    x, denoiser, steps = stepping.prepare(denoise, schedule, times, x)
    count = len(steps.t)
    order = check_order(order, count)
    for number in disable_corrector:
        if not 0 <= number < count:
            raise ConfigError(
                f"disable_corrector={number}; expected numbers of steps, from 0 to {count - 1}"
            )
    form = "x0" if predict_x0 else "eps"
    rules = Rules(solver_type, True, lower_order_final)
    asked = ~np.isin(np.arange(count), list(disable_corrector))
    if not corrector:
        asked = asked & corrected & begins(steps)
    return run_corrected(form, denoiser, steps, x, order, rules, asked, trajectory)
