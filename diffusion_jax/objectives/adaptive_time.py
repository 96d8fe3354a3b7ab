"""Noise levels drawn where the loss is large: importance sampling from running statistics.

The quantile u in (0, 1) of the given time sampling is cut into K cells of equal probability. Cell
k is drawn with

    p_k = floor / K + (1 - floor) s_k / sum_j s_j,        s_k = sqrt(E[loss^2 | k])        (1)

which is the choice of least variance for the reweighted estimate (Nichol & Dhariwal 2021,
arXiv:2102.09672, section 3.3)

    E_u[loss] = E_p[loss / (K p_k)]                                                        (2)

Without the reweighting, the noise levels are weighted by K p_k, as a change of the objective. The
second moment of a cell is a running mean over its draws, mixed with `prior` draws of the mean over
all cells: a cell that was hardly seen is taken for an average one.

The statistics that a step draws by are those of the steps before it, however many micro-batches it
has: what the current step observes waits in `pending_*` until a later step begins. They live in the
objective's `extra`, so that they are saved, resumed and (being sums over the global batch) equal
on every mesh up to rounding.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from diffusion_jax.diffusion.time_sampling import stratified
from diffusion_jax.errors import ConfigError

Statistics = dict[str, Any]


class Draw(NamedTuple):
    """Quantiles to train on.

    Attributes:
        u: [B] in [0, 1), to be put through the given time sampling's quantile function.
        cell: [B] in 0 .. K - 1.
        ratio: [B] 1 / (K p_k), the factor of (2), at most 1 / floor.
    """

    u: Float[Array, " batch"]
    cell: Int[Array, " batch"]
    ratio: Float[Array, " batch"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptiveTime:
    """Importance sampling of noise levels by (1).

    Attributes:
        cells: K.
        decay: of the statistics, per step; 1 / (1 - decay) steps are remembered.
        floor: share of the draws that stays with the given time sampling.
        prior: draws that every cell is given in advance.
        reweight: whether the loss is multiplied by the ratio of (2), which leaves its expectation
            as it was; otherwise the change of emphasis is meant.
        stratified: whether the draws of a batch are spread evenly.
    """

    cells: int = 64
    decay: float = 0.99
    floor: float = 0.1
    prior: float = 10.0
    reweight: bool = True
    stratified: bool = True

    def __post_init__(self) -> None:
        where = "objective.denoising.adaptive.loss"
        for field, good, expected in (
            ("cells", self.cells >= 1, "at least 1"),
            ("decay", 0.0 <= self.decay < 1.0, "a number in [0, 1)"),
            ("floor", 0.0 < self.floor <= 1.0, "a number in (0, 1]"),
            ("prior", self.prior > 0.0, "a number above 0"),
        ):
            if not good:
                value = getattr(self, field)
                raise ConfigError(f"{where}.{field}={value!r}: expected {expected}")

    def init(self) -> Statistics:
        """Statistics before the first step: nothing seen."""
        empty = jnp.zeros((self.cells,))
        return {
            "square": empty,
            "count": empty,
            "pending_square": empty,
            "pending_count": empty,
            "step": jnp.full((), -1, jnp.int32),
        }

    def begin(self, statistics: Statistics, step: Any) -> Statistics:
        """Takes what earlier steps observed into the statistics that step `step` draws by."""
        later = statistics["step"] != step
        result = {"step": jnp.asarray(step, jnp.int32)}
        for name in ("square", "count"):
            pending = statistics[f"pending_{name}"]
            taken = self.decay * statistics[name] + pending
            result[name] = jnp.where(later, taken, statistics[name])
            result[f"pending_{name}"] = jnp.where(later, jnp.zeros_like(pending), pending)
        return result

    def probabilities(self, statistics: Statistics) -> Float[Array, " cells"]:
        """(1); uniform while nothing was seen."""
        square, count = statistics["square"], statistics["count"]
        seen = jnp.sum(count)
        mean = jnp.where(seen > 0, jnp.sum(square) / jnp.where(seen > 0, seen, 1.0), 1.0)
        size = jnp.sqrt((square + self.prior * mean) / (count + self.prior))
        total = jnp.sum(size)
        share = jnp.where(total > 0, size / jnp.where(total > 0, total, 1.0), 1.0 / self.cells)
        return self.floor / self.cells + (1.0 - self.floor) * share

    def draw(
        self,
        statistics: Statistics,
        u: Float[Array, " batch"],
        stratum: Float[Array, " batch"],
        batch_size: int,
    ) -> Draw:
        """Draws cells by (1) and places in them uniformly.

        Args:
            statistics: as `begin` returns them.
            u: [B], uniform in [0, 1).
            stratum: [B], place of each example in the global batch, in [0, 1).
            batch_size: of the global batch.
        """
        if self.stratified:
            u = stratified(u, stratum, batch_size)
        p = self.probabilities(statistics)
        ends = jnp.cumsum(p)
        cell = jnp.minimum(jnp.searchsorted(ends, u * ends[-1], side="right"), self.cells - 1)
        inside = (u * ends[-1] - (ends[cell] - p[cell])) / p[cell]
        largest = 1.0 - float(jnp.finfo(jnp.float32).epsneg)
        place = jnp.minimum((cell + jnp.clip(inside, 0.0, 1.0)) / self.cells, largest)
        return Draw(place, cell, 1.0 / (self.cells * p[cell]))

    def observe(
        self,
        statistics: Statistics,
        cell: Int[Array, " batch"],
        losses: Float[Array, " batch"],
        mask: Any = None,
    ) -> Statistics:
        """Adds the losses [B] (not reweighted) of the drawn cells [B] to what is pending."""
        keep = jnp.ones_like(losses) if mask is None else mask.astype(losses.dtype)
        squares = jnp.where(keep > 0, jnp.square(jax.lax.stop_gradient(losses)), 0.0)

        def per_cell(values: Any) -> Any:
            return jnp.zeros((self.cells,)).at[cell].add(values)

        return {
            **statistics,
            "pending_square": statistics["pending_square"] + per_cell(squares),
            "pending_count": statistics["pending_count"] + per_cell(keep),
        }
