"""PNDM and PLMS: some timesteps are evaluated more than once before a step is done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_jax.interop.discrete_schedulers import table_plan
from diffusion_jax.interop.scheduler_config import SchedulerConfig
from diffusion_jax.interop.scheduler_plan import SchedulerPlan
from diffusion_jax.interop.timestep_lists import spaced


def pndm(config: SchedulerConfig, steps: int | None, arguments: Mapping[str, Any]) -> SchedulerPlan:
    """Pseudo Runge-Kutta for three steps and then linear multistep, or linear multistep alone."""
    if arguments.get("begin_index"):
        # diffusers then repeats a step that its list of timesteps does not repeat.
        raise config.refuse_argument("begin_index", arguments["begin_index"], "0")
    prk = not config["skip_prk_steps"]
    least = 4 if prk else 2
    if steps is None or steps < least:
        raise config.refuse_argument("steps", steps, f"{least} or more")
    grid = spaced(config, steps)
    stride = config.size // steps
    evaluated = grid[[0, 1, *range(1, steps)]]
    if prk:
        middles = grid[1:4] + stride // 2
        start = np.stack([grid[:3], middles, middles, grid[1:4]], 1).ravel()
        evaluated = np.append(start, grid[3:])
    config.choose("prediction_type", ("epsilon", "v_prediction"))
    options: dict[str, Any] = {"prk": prk, "stride": stride}
    if config["prediction_type"] == "v_prediction":
        options["values"] = "v"
    return table_plan(
        config,
        grid,
        grid - stride,
        evaluated=evaluated,
        solver="pndm",
        options=options,
        draws=(0,) * steps,
    )
