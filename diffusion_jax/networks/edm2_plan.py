"""Which blocks an EDM2 network has, and which of them are alike and follow each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockOptions:
    """What all blocks of a network have in common.

    Attributes:
        rank: number of spatial axes.
        condition: width of the embedding of noise and conditions.
        text_dim: width of the text's tokens, 0 without.
        dropout: rate in the branch; active when a key is given.
        residual_balance, attention_balance, skip_balance: shares of `mp_sum` and `mp_cat`.
        attention: implementation, see `attend`.
        dtype: compute dtype.
    """

    rank: int
    condition: int
    text_dim: int
    dropout: float
    residual_balance: float
    attention_balance: float
    skip_balance: float
    attention: str
    dtype: Any


class Run(NamedTuple):
    """Blocks of one shape that follow each other.

    Attributes:
        name: where they stand.
        source: channels that reach the first.
        skip: channels of the skip that each takes, 0 for none.
        width: channels that leave.
        heads: of the attention, 0 for none.
        decoder: whether they are built as those of the way up.
        resample: `down`, `up` or nothing, before the first.
        keep: whether what leaves them is a skip.
        depth: how many.
    """

    name: str
    source: int
    skip: int
    width: int
    heads: int
    decoder: bool
    resample: str
    keep: bool
    depth: int = 1


def plan_runs(
    widths: Sequence[int], blocks: int, attended: Collection[int], heads: Sequence[int]
) -> dict[str, list[Run]]:
    """The runs of the way down, of the middle and of the way up, in order of execution.

    Args:
        widths: channels of each level.
        blocks: blocks a level on the way down.
        attended: levels whose blocks have attention.
        heads: of each level; the last has attention in the middle in any case.
    """
    down, up, skips, width = [], [], [widths[0]], widths[0]
    last = len(widths) - 1
    at = [count if level in attended else 0 for level, count in enumerate(heads)]
    for level, wide in enumerate(widths):
        if level:
            down.append(Run(f"level{level}_down", width, 0, width, 0, False, "down", True))
            skips.append(width)
        for i in range(blocks):
            down.append(Run(f"level{level}_{i}", width, 0, wide, at[level], False, "", True))
            width = wide
            skips.append(width)
    middle = [
        Run("0", width, 0, width, heads[last], True, "", False),
        Run("1", width, 0, width, 0, True, "", False),
    ]
    for level in reversed(range(len(widths))):
        if level < last:
            up.append(Run(f"level{level}_up", width, 0, width, 0, True, "up", False))
        for i in range(blocks + 1):
            wide, skip = widths[level], skips.pop()
            up.append(Run(f"level{level}_{i}", width, skip, wide, at[level], True, "", False))
            width = wide
    return {"down": _merged(down), "middle": middle, "up": _merged(up)}


def _merged(parts: Sequence[Run]) -> list[Run]:
    """Runs of one block each, those alike that follow each other made into one.

    What enters a block of a longer run must have the shape of what leaves it.
    """
    runs: list[Run] = []
    for part in parts:
        before = runs[-1] if runs else None
        same = before is not None and before._replace(name="", depth=1) == part._replace(name="")
        if before is not None and same and part.source == part.width and not part.resample:
            runs[-1] = before._replace(depth=before.depth + 1)
        else:
            runs.append(part)
    return runs
