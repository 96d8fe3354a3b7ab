"""Moving averages of the parameters, several lengths side by side; any length afterwards.

Exponential, with a warm-up that keeps the random initial weights from lingering (after n updates
the length is about n / 9 until `decay` takes over):

    ema <- d_n ema + (1 - d_n) params,    d_n = min(decay, (1 + n) / (10 + n))             (1)

Power function (Karras et al. 2024, arXiv:2312.02696, section 3.1): after t updates the weights of
update i make up the profile p, whose width is a constant share sigma_rel of the run so far:

    p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1),    0 < tau <= t                        (2)
    ema <- b_t ema + (1 - b_t) params,    b_t = (1 - 1/t)^(gamma + 1)                      (3)
    sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))                                (4)

(3) keeps (2) exactly: update i has the weight of the interval (i - 1, i]. From averages of two
lengths, stored now and then (the checkpoints that are kept), that of any other length follows:
the weights x that bring the sum of the stored profiles nearest to the wanted one, in L2 (section
3.2 there), under the condition that they sum to one,

    minimise |sum_i x_i p_i - p|^2    subject to    sum_i x_i = 1                          (5)

which the paper leaves out: with it, parameters that stood still come out as they are, however few
averages are stored.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion_jax.checkpoints import Checkpointer
from diffusion_jax.errors import ConfigError

PyTree = Any
WIDEST = 1.0 / math.sqrt(12.0)
"""sigma_rel of gamma = 0, the plain mean over the run."""


def decay_at(updates: Any, decay: float, *, warmup: bool = True) -> Float[Array, ""]:
    """Decay of update number `updates` (counted from 0), equation (1)."""
    n = jnp.asarray(updates, jnp.float32)
    limit = jnp.float32(decay)
    return jnp.minimum(limit, (1.0 + n) / (10.0 + n)) if warmup else limit


def power_rate(updates: Any, gamma: float) -> Float[Array, ""]:
    """1 - b_t of update number `updates` (counted from 0, so t = updates + 1), equation (3).

    Of the first update it is 1: the random initial weights are in no power function average.
    """
    t = jnp.asarray(updates, jnp.float32) + 1.0
    return -jnp.expm1((gamma + 1.0) * jnp.log1p(-1.0 / t))


def update(
    averages: Mapping[str, PyTree],
    params: PyTree,
    updates: Any,
    decays: Mapping[str, float],
    *,
    warmup: bool = True,
    powers: Mapping[str, float] | None = None,
) -> dict[str, PyTree]:
    """Moves every named average one step towards `params`.

    Args:
        averages: `{name: tree like params}`, float32.
        params: current parameters, float32.
        updates: updates made before this one.
        decays: `{name: decay in [0, 1)}` of the exponential averages.
        warmup: whether short exponential averages are used at the start, equation (1).
        powers: `{name: sigma_rel}` of the power function averages; each name of `averages` is in
            either mapping.
    """
    powers = powers or {}
    result = {}
    for name, tree in averages.items():
        if name in powers:
            rate = power_rate(updates, gamma_of(powers[name]))
        else:
            rate = 1.0 - decay_at(updates, decays[name], warmup=warmup)
        result[name] = jax.tree.map(lambda a, p, rate=rate: a + rate * (p - a), tree, params)
    return result


def sigma_rel_of(gamma: float) -> float:
    """The width of profile (2) as a share of t, its standard deviation over t; equation (4)."""
    return math.sqrt(gamma + 1.0) / ((gamma + 2.0) * math.sqrt(gamma + 3.0))


def gamma_of(sigma_rel: float) -> float:
    """The exponent of the profile of a width, the inverse of (4): a root of a cubic.

    Raises:
        ConfigError: `sigma_rel` is not in (0, 0.2886], the widths of gamma >= 0.
    """
    if not 0.0 < sigma_rel <= WIDEST:
        raise ConfigError(
            f"sigma_rel={sigma_rel!r}: expected a number in (0, {math.floor(WIDEST * 1e4) / 1e4}],"
            " such as 0.05 or 0.1"
        )
    inverse = sigma_rel**-2.0
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return max(0.0, float(np.max(roots[np.abs(roots.imag) < 1e-9 * np.abs(roots)].real)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A stored power function average.

    Attributes:
        updates: t, the updates made when it was stored (skipped ones left out).
        gamma: exponent of its profile.
        load: () -> the tree; called once, and only if it is needed.
    """

    updates: int
    gamma: float
    load: Callable[[], PyTree]


def reconstruct(
    snapshots: Sequence[Snapshot], sigma_rel: float, updates: int | None = None
) -> PyTree:
    """The power function average of any length after a number of updates; equation (5).

    One stored tree is held at a time, beside the sum. A length that was itself tracked, at an
    update at which it was stored, comes back with the stored bits.

    Args:
        snapshots: those up to `updates` are used; more of them, and of two lengths on both sides
            of the wanted one, are nearer to the average as tracked.
        sigma_rel: wanted width, in (0, 0.2886].
        updates: t of the wanted average; None takes that of the newest snapshot.

    Returns:
        tree of float32 arrays like the snapshots'.

    Raises:
        ConfigError: no snapshot up to `updates`, or none as new as that.
    """
    gamma = gamma_of(sigma_rel)
    newest = max((s.updates for s in snapshots), default=0)
    updates = newest if updates is None else updates
    used = [s for s in snapshots if 0 < s.updates <= updates]
    if not used or updates > newest:
        raise ConfigError(
            f"sigma_rel={sigma_rel!r}: no power function average is stored at update {updates}; "
            f"stored: {sorted({s.updates for s in snapshots})}; train with config.ema.powers set"
        )
    stored = [(float(s.updates), s.gamma) for s in used]
    weights = solve_weights(stored, (float(updates), gamma))
    total = None
    for snapshot, weight in zip(used, weights, strict=True):
        if weight == 0.0:
            continue
        tree = snapshot.load()
        total = _scaled(tree, weight) if total is None else _add(total, tree, np.float32(weight))
        del tree
    return total


def solve_weights(
    stored: Sequence[tuple[float, float]], wanted: tuple[float, float]
) -> Float[np.ndarray, " stored"]:
    """The weights x of equation (5), in float64; what is below 1e-7 counts for nothing.

    Args:
        stored: (t, gamma) of each stored average; no pair twice.
        wanted: (t, gamma) of the average to be built.
    """
    count = len(stored)
    system = np.zeros((count + 1, count + 1))
    right = np.ones(count + 1)
    for i, a in enumerate(stored):
        # Times t of the wanted one: numbers near 1 beside the condition's ones.
        system[i, :count] = [wanted[0] * _overlap(a, b) for b in stored]
        right[i] = wanted[0] * _overlap(a, wanted)
    system[count, :count] = system[:count, count] = 1.0
    weights = np.linalg.lstsq(system, right, rcond=1e-15)[0][:count]
    weights = np.where(np.abs(weights) < 1e-7, 0.0, weights)
    return weights / weights.sum()


def misfit(stored: Sequence[tuple[float, float]], wanted: tuple[float, float]) -> float:
    """|sum_i x_i p_i - p| / |p| of equation (5): what a reconstruction cannot follow, as a share.

    Args:
        stored: (t, gamma) of each stored average.
        wanted: (t, gamma) of the average to be built.
    """
    weights = solve_weights(stored, wanted)
    rows = np.array([[_overlap(a, b) for b in (*stored, wanted)] for a in (*stored, wanted)])
    signed = np.append(weights, -1.0)
    return math.sqrt(max(signed @ rows @ signed, 0.0) / rows[-1, -1])


def _overlap(a: tuple[float, float], b: tuple[float, float]) -> float:
    """The integral of p_a p_b over (0, min(t_a, t_b)], with each p by (2)."""
    (t, gamma), (later_t, later_gamma) = sorted([a, b])
    shape = (gamma + 1.0) * (later_gamma + 1.0) / (gamma + later_gamma + 1.0)
    return shape * (t / later_t) ** later_gamma / later_t


def _scaled(tree: PyTree, weight: float) -> PyTree:
    if weight == 1.0:
        return tree
    return jax.tree.map(lambda a: a * np.float32(weight), tree)


@functools.partial(jax.jit, donate_argnums=0)
def _add(total: PyTree, tree: PyTree, weight: Any) -> PyTree:
    return jax.tree.map(lambda a, b: a + weight * b, total, tree)


def stored_snapshots(
    checkpoints: Checkpointer, powers: Mapping[str, float], abstract: PyTree
) -> list[Snapshot]:
    """The power function averages in the checkpoints that are kept, oldest first.

    Args:
        checkpoints: of a run, also opened `read_only`.
        powers: `{name: sigma_rel}` as the run was trained with.
        abstract: tree of `jax.ShapeDtypeStruct` (with shardings, or for the first device) of the
            averages, or of that part of them that is wanted.
    """
    scalar = {"opt_state": {"guard": {"skipped": jax.ShapeDtypeStruct((), jnp.int32)}}}
    found = []
    for step in checkpoints.steps():
        skipped = checkpoints.restore_subtree(scalar, step)["opt_state"]["guard"]["skipped"]
        for name, sigma_rel in sorted(powers.items()):
            load = functools.partial(_load, checkpoints, name, abstract, step)
            found.append(
                Snapshot(updates=step - int(skipped), gamma=gamma_of(sigma_rel), load=load)
            )
    return found


def _load(checkpoints: Checkpointer, name: str, abstract: PyTree, step: int) -> PyTree:
    return checkpoints.restore_subtree({"ema": {name: abstract}}, step)["ema"][name]
