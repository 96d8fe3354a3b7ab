"""Which weights of a run are sampled from: an average it stored, the raw ones, or an average of
any length made afterwards from those of the power function (`training.ema`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from diffusion_jax.checkpoints import Checkpointer
from diffusion_jax.errors import ConfigError, unknown_name
from diffusion_jax.objectives.base import network_params
from diffusion_jax.training import ema
from diffusion_jax.training.state import TrainState

PyTree = Any
LARGEST_MISFIT = 0.2
"""Share of a wanted profile, in L2, that a reconstruction may miss. Beyond it another length than
the one asked for would be sampled from."""
SHOWN = 6


def stored_weights(
    checkpoints: Checkpointer,
    abstract: TrainState,
    *,
    name: str,
    length: float | None = None,
    powers: Mapping[str, float] | None = None,
    note: Callable[[str], None] | None = None,
    step: int | None = None,
) -> PyTree:
    """The network's parameters as a run stored them, newest checkpoint unless `step` is given.

    Args:
        checkpoints: of the run, also opened `read_only`.
        abstract: shapes and shardings of its state, on the mesh where the parameters are wanted.
        name: of the average; "" takes the raw parameters.
        length: relative length (sigma_rel) of an average to be made from those of `powers` in all
            checkpoints that were kept; goes before `name`.
        powers: `{name: sigma_rel}` of the power function averages that the run tracked.
        note: takes a line about what an average of that length is made from.
        step: a stored step; not with `length`, which is made from all of them.

    Raises:
        ConfigError: no such average or step, or none of that length can be made.
    """
    if length is not None:
        return _reconstructed(checkpoints, abstract, length, powers or {}, note)
    if not name:
        shapes = network_params(abstract.params)
        return checkpoints.restore_subtree({"params": shapes}, step)["params"]
    if name not in abstract.ema:
        raise ConfigError(f"{unknown_name('ema', name, abstract.ema)}; or '' for the raw weights")
    shapes = network_params(abstract.ema[name])
    return checkpoints.restore_subtree({"ema": {name: shapes}}, step)["ema"][name]


def _reconstructed(
    checkpoints: Checkpointer,
    abstract: TrainState,
    length: float,
    powers: Mapping[str, float],
    note: Callable[[str], None] | None,
) -> PyTree:
    field = f"ema_length={length!r}"
    if isinstance(length, bool) or not isinstance(length, int | float):
        raise ConfigError(f"{field}: expected a number, such as 0.08")
    if not 0.0 < length <= ema.WIDEST:
        widest = math.floor(1e4 * ema.WIDEST) / 1e4
        raise ConfigError(f"{field}: expected a share of the run in (0, {widest}], such as 0.08")
    if not powers:
        raise ConfigError(
            f"{field}: the run tracked no power function average to make it from; train with "
            "config.ema.powers, such as short=0.05 and long=0.1, or take one of --ema="
            f"{', '.join(sorted(abstract.ema))}"
        )
    shapes = network_params(abstract.ema[min(powers)])
    found = ema.stored_snapshots(checkpoints, powers, shapes)
    snapshots = [snapshot for snapshot in found if snapshot.updates > 0]
    if not snapshots:
        raise ConfigError(f"{field}: {str(checkpoints.directory)!r} holds no average to make it of")
    stored = [(float(s.updates), s.gamma) for s in snapshots]
    wanted = (max(stored)[0], ema.gamma_of(length))
    misfit = ema.misfit(stored, wanted)
    if misfit > LARGEST_MISFIT:
        raise ConfigError(f"{field}: {_refusal(stored, misfit)}")
    if note is not None:
        note(f"{field}: {_recipe(stored, wanted)}; {100.0 * misfit:.2g}% of its profile is missed")
    return ema.reconstruct(snapshots, float(length))


def _recipe(stored: Sequence[tuple[float, float]], wanted: tuple[float, float]) -> str:
    """The stored averages that are summed, the heaviest first."""
    weights = ema.solve_weights(stored, wanted)
    order = sorted(np.flatnonzero(weights).tolist(), key=lambda i: -abs(weights[i]))
    parts = [
        f"{weights[i]:+.3g} x (length {ema.sigma_rel_of(stored[i][1]):.3g} at {stored[i][0]:.0f})"
        for i in order
    ]
    more = f" and {len(parts) - SHOWN} more" if len(parts) > SHOWN else ""
    return f"{len(parts)} of {len(stored)} stored averages: {', '.join(parts[:SHOWN])}{more}"


def _refusal(stored: Sequence[tuple[float, float]], misfit: float) -> str:
    lengths = sorted({round(ema.sigma_rel_of(gamma), 6) for _, gamma in stored})
    times = len({t for t, _ in stored})
    which = f"{', '.join(f'{x:.3g}' for x in lengths)} at {times} checkpoint{'s'[: times > 1]}"
    newest = max(stored)[0]
    near = [
        sigma
        for sigma in np.geomspace(0.002, 0.9999 * ema.WIDEST, 200).tolist()
        if ema.misfit(stored, (newest, ema.gamma_of(sigma))) <= LARGEST_MISFIT
    ]
    # A run of one tracked length may meet nothing but that.
    low, high = min([*near, lengths[0]]), max([*near, lengths[-1]])
    return (
        f"the averages stored (of {which}) miss {100.0 * misfit:.0f}% of its profile; expected "
        f"{low:.2g} to {high:.2g}, or more checkpoints (train with config.checkpoint.keep_every)"
    )
