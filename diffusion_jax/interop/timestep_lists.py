"""Timesteps: those of a config's spacing, and lists of timesteps or levels given by the caller."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_jax.diffusion.broadcasting import Number
from diffusion_jax.interop.scheduler_config import SchedulerConfig

SPACINGS = ("linspace", "leading", "trailing")

# Classes that take the number of steps beside a list of as many entries.
_COUNTED = ("FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler")

_GRIDS = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
    "use_flow_sigmas",
)


def spaced(
    config: SchedulerConfig,
    steps: int | None,
    *,
    kind: str | None = None,
    size: int | None = None,
    extra: int = 0,
    whole: bool = True,
) -> np.ndarray:
    """Timesteps, falling, float64, as the config spaces them.

    Args:
      config: says how, and their number in training.
      steps: how many.
      kind: one of `SPACINGS`; that of the config if None.
      size: where the first is counted from, if not from the last of training.
      extra: intervals that the even spacings have besides those of the steps, at their low end.
      whole: whether "linspace" rounds.

    Raises:
      ConfigError: another spacing, a number of steps out of range, or an offset that leads beyond
        the last timestep.
    """
    trained = config.size
    kind = kind or config.choose("timestep_spacing", SPACINGS)
    size = trained if size is None else size
    # Of more, the even spacings repeat some.
    most = trained if kind == "trailing" else size - extra
    if steps is None or not 1 <= steps <= most:
        raise config.refuse_argument("steps", steps, f"a number from 1 to {most}")
    match kind:
        case "linspace":
            even = np.linspace(0, size - 1, steps + extra)
            even = even.round() if whole else even
            return even[::-1][:steps]
        case "leading":
            offset = config.whole("steps_offset", least=0)
            first = np.arange(extra, steps + extra)[::-1] * float(size // (steps + extra))
            if first[0] + offset > trained - 1:
                expected = f"at most {trained - 1 - int(first[0])} for {steps} steps"
                raise config.refuse_argument("steps_offset", offset, expected)
            return first + offset
        case _:
            return np.arange(size, 0, -trained / steps).round() - 1.0


def given_falling(
    config: SchedulerConfig,
    name: str,
    values: Any,
    low: Number,
    high: Number,
    *,
    above: bool = False,
    whole: bool = False,
) -> np.ndarray:
    """The caller's list `name`, falling from at most `high` to `low`, as float64.

    Args:
      config: names the class in the error.
      name: of the argument.
      values: its value.
      low: the least entry.
      high: the greatest.
      above: whether `low` itself is excluded.
      whole: whether entries must be whole.

    Raises:
      ConfigError: anything else; one line that says what was expected.
    """
    kind = "whole numbers" if whole else "numbers"
    expected = f"falling {kind} from at most {high:g} to {'above' if above else 'at least'} {low:g}"
    try:
        listed = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        listed = np.empty(0)
    fits = listed.ndim == 1 and len(listed) > 0 and bool(np.isfinite(listed).all())
    fits = fits and bool((np.diff(listed) < 0.0).all() and listed[0] <= high)
    fits = fits and bool(listed[-1] > low if above else listed[-1] >= low)
    if not fits or (whole and (listed != listed.round()).any()):
        shown = values.tolist() if hasattr(values, "tolist") else values
        raise config.refuse_argument(name, shown, expected)
    return listed


def check_lists(config: SchedulerConfig, steps: int | None, arguments: Mapping[str, Any]) -> None:
    """Refuses arguments of which one would be dropped: a list of timesteps decides the grid.

    Raises:
      ConfigError: a list beside steps or another list, or with a config that has a grid of its own.
    """
    lists = [name for name in ("timesteps", "sigmas") if name in arguments]
    counts = {np.size(arguments[name]) for name in lists}
    if lists and steps is not None and not (config.class_name in _COUNTED and counts == {steps}):
        also = f" or {min(counts)}" if config.class_name in _COUNTED else ""
        raise config.refuse_argument("steps", steps, f"None{also} beside {lists[0]}")
    flow = config.class_name == "FlowMatchEulerDiscreteScheduler"
    if len(lists) == 2 and not (flow and len(counts) == 1):
        expected = "as many as there are timesteps" if flow else "None beside timesteps"
        raise config.refuse_argument("sigmas", arguments["sigmas"], expected)
    if "timesteps" in lists and not flow:
        for field in _GRIDS:
            if config.get(field):
                expected = f"None with {field}={config[field]!r}"
                raise config.refuse_argument("timesteps", arguments["timesteps"], expected)
    if "mu" in arguments and not config["use_dynamic_shifting"]:
        raise config.refuse_argument("mu", arguments["mu"], "None without use_dynamic_shifting")
