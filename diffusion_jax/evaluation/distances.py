"""Which of all pairs of features are near: by products in float32, and exactly where it is close.

    |x - y|^2 = |x|^2 + |y|^2 - 2 x.y

costs one matrix product, in float32 half of one in float64. It is off by at most

    margin = (2 lambda sqrt(D + 2) + 8) u (|x|^2 + |y|^2),    u = 2^-24, lambda = 8

but for one pair in exp(lambda^2/2)/2 (Higham and Mary 2019, theorem 2.4), which is little as the
features are taken from their mean. A pair nearer than that to what it is compared with is decided
by the sum of its squared differences in float64: comparisons and ranks are those of float64.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int

ROWS = 1024
ROUNDING = 2.0**-24
LAMBDA = 8.0
GROUP = 16
"""Columns whose smallest square stands for them, in a search for a bound."""
_VALUES = 2**21
"""Differences at a time, which bounds the memory."""


@dataclasses.dataclass(frozen=True)
class Points:
    """Features, and what the products need of them.

    Attributes:
        values: [n, D] as given.
        centre: [D], from where they are taken in float32.
    """

    values: np.ndarray
    centre: Float64[np.ndarray, " d"]

    @classmethod
    def of(cls, values: Any, centre: Any = None) -> Points:
        values = np.asarray(values)
        return cls(values, values.mean(0, dtype=np.float64) if centre is None else centre)

    @functools.cached_property
    def centred(self) -> Float32[np.ndarray, "n d"]:
        return (self.values - self.centre).astype(np.float32)

    @functools.cached_property
    def norms(self) -> Float64[np.ndarray, " n"]:
        """Squared lengths of the centred."""
        return np.einsum("nd,nd->n", self.centred, self.centred, dtype=np.float64)

    @functools.cached_property
    def right(self) -> Float32[np.ndarray, "n d_and_2"]:
        """(y, 1, |y|^2), whose product with `left` is the squared distance."""
        ones = np.ones((len(self.norms), 1), np.float32)
        return np.concatenate([self.centred, ones, self.norms[:, None].astype(np.float32)], axis=1)

    def left(self, rows: slice) -> Float32[np.ndarray, "rows d_and_2"]:
        """(-2 x, |x|^2, 1)."""
        norms = self.norms[rows, None].astype(np.float32)
        return np.concatenate([-2.0 * self.centred[rows], norms, np.ones_like(norms)], axis=1)


@dataclasses.dataclass(frozen=True)
class Block:
    """Some examples x against all y.

    Attributes:
        x, y: all of them.
        rows: which x.
        squares: [rows, m] squared distances in float32, to the margin.
    """

    x: Points
    y: Points
    rows: slice
    squares: Float32[np.ndarray, "rows m"]

    @functools.cached_property
    def margin(self) -> float:
        """The largest of the block."""
        factor = (2.0 * LAMBDA * math.sqrt(self.x.values.shape[1] + 2.0) + 8.0) * ROUNDING
        return factor * float(self.x.norms[self.rows].max() + self.y.norms.max())

    def exact(self, row: Any, column: Any) -> Float64[np.ndarray, " pairs"]:
        """Squared distances of pairs, by their differences."""
        found = np.empty(len(row))
        step = max(1, _VALUES // self.x.values.shape[1])
        for start in range(0, len(row), step):
            part = slice(start, start + step)
            x = self.x.values[self.rows][row[part]].astype(np.float64)
            x -= self.y.values[column[part]]
            found[part] = np.einsum("pd,pd->p", x, x)
        return found

    def within(self, reach: Any) -> Bool[np.ndarray, "rows m"]:
        """Which squared distances are at most `reach`, [m] or [rows, 1]."""
        reach = np.asarray(reach, np.float64)
        possible = self.squares <= (reach + self.margin).astype(np.float32)
        doubtful = possible & (self.squares >= (reach - self.margin).astype(np.float32))
        if doubtful.any():
            row, column = np.nonzero(doubtful)
            limits = np.broadcast_to(reach, self.squares.shape)[row, column]
            possible[row, column] = self.exact(row, column) <= limits
        return possible

    def nearest(self, count: int, known: Any = math.inf) -> tuple[np.ndarray, ...]:
        """Pairs among which are those of each x with its `count` nearest y.

        Args:
            count: how many, at most the number of y.
            known: [rows], squared distances beyond which nothing is asked for.

        Returns:
            Rows, columns and exact squared distances of the pairs, in the order of the rows.
        """
        # The smallest squares of so many groups are no more than the squares of so many pairs.
        columns = self.squares.shape[1] // GROUP * GROUP
        some = self.squares
        if columns >= count * GROUP:
            some = self.squares[:, :columns].reshape(len(some), -1, GROUP).min(2)
        bound = np.partition(some, count - 1, axis=1)[:, count - 1] + self.margin
        limit = (np.minimum(bound, known) + self.margin).astype(np.float32)
        row, column = np.nonzero(self.squares <= limit[:, None])
        return row, column, self.exact(row, column)


def blocks(x: Points, y: Points) -> Iterator[Block]:
    """Blocks of all x; memory grows with the y alone. Their centres must be one."""
    for start in range(0, len(x.values), ROWS):
        rows = slice(start, min(start + ROWS, len(x.values)))
        yield Block(x, y, rows, x.left(rows) @ y.right.T)


def smallest(
    row: Int[np.ndarray, " pairs"],
    place: Int[np.ndarray, " pairs"],
    squares: Float[np.ndarray, " pairs"],
    rows: int,
    count: int,
) -> tuple[Float64[np.ndarray, "rows count"], Int[np.ndarray, "rows count"]]:
    """The smallest squares of each row's pairs and their places, of equal ones the first place; inf
    where there are fewer."""
    order = np.lexsort((place, squares, row))
    squares, row, place = squares[order], row[order], place[order]
    starts = np.searchsorted(row, np.arange(rows + 1))
    best, where = np.full((rows, count), np.inf), np.zeros((rows, count), np.int64)
    for k in range(count):
        there = starts[:-1] + k < starts[1:]
        best[there, k] = squares[starts[:-1][there] + k]
        where[there, k] = place[starts[:-1][there] + k]
    return best, where
