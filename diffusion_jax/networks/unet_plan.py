"""Which parts a U-Net has at which level, and the checks of what its levels can be."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from diffusion_jax.errors import ConfigError
from diffusion_jax.networks.validation import check_divides, check_positive


class Part(NamedTuple):
    """What stands at one place.

    Attributes:
        name: where, such as `level0_1`.
        kind: `residual`, `attention` (a residual block, then attention), `downsample`, `upsample`.
        level: 0 for the full size.
        source: channels that reach it, those of its skip among them.
        skip: channels of the skip that it takes, 0 for none.
        depth: how many alike follow each other here.
    """

    name: str
    kind: str
    level: int
    source: int
    skip: int = 0
    depth: int = 1


class Plan(NamedTuple):
    """Parts of the way down, the middle and the way up, in the order in which they run."""

    down: Sequence[Part]
    middle: Sequence[Part]
    up: Sequence[Part]


def layer_plan(
    channels: int,
    widths: Sequence[int],
    blocks: Sequence[int],
    attended: Collection[int],
    *,
    middle_attention: bool = True,
    up_attention: str = "all",
) -> Plan:
    """The parts of a U-Net.

    Args:
        channels: width of the first layer.
        widths: width of each level.
        blocks: of each level on the way down; one more on the way up.
        attended: levels with attention.
        middle_attention: between the two blocks of the middle.
        up_attention: on the way up after `all` blocks of such a level, or after the `last`.
    """
    down, up, skips, width = [], [], [channels], channels
    last = len(widths) - 1
    kinds = ["attention" if level in attended else "residual" for level in range(len(widths))]
    for level in range(len(widths)):
        for i in range(blocks[level]):
            down.append(Part(f"level{level}_{i}", kinds[level], level, width))
            width = widths[level]
            skips.append(width)
        if level < last:
            down.append(Part(f"level{level}_downsample", "downsample", level, width))
            skips.append(width)
    kind = "attention" if middle_attention else "residual"
    middle = [Part("0", kind, last, width), Part("1", "residual", last, width)]
    for level in reversed(range(len(widths))):
        for i in range(blocks[level] + 1):
            attends = up_attention == "all" or i == blocks[level]
            kind, skip = kinds[level] if attends else "residual", skips.pop()
            up.append(Part(f"level{level}_{i}", kind, level, width + skip, skip))
            width = widths[level]
        if level:
            up.append(Part(f"level{level}_upsample", "upsample", level, width))
    return Plan(down, middle, up)


def merged(parts: Sequence[Part], widths: Sequence[int]) -> list[Part]:
    """The parts, blocks alike that follow each other made into one of that depth.

    What enters a block of a longer part must have the shape of what leaves it.
    """
    runs: list[Part] = []
    for part in parts:
        before = runs[-1] if runs else part
        alike = before._replace(name=part.name, depth=1) == part
        enters = part.source - part.skip == widths[part.level]
        if runs and alike and enters and part.kind in ("residual", "attention"):
            runs[-1] = before._replace(depth=before.depth + 1)
        else:
            runs.append(part)
    return runs


def level_blocks(section: str, blocks: int | Sequence[int], levels: int) -> tuple[int, ...]:
    """Blocks of each level, from one number or one a level; ConfigError for another number."""
    each = (blocks,) * levels if isinstance(blocks, int) else tuple(blocks)
    if len(each) != levels:
        raise ConfigError(
            f"{section}.blocks={each}: expected one number, or one for each of {levels} levels"
        )
    for number in each:
        check_positive(section, blocks=number)
    return each


def level_sizes(
    section: str, space: Sequence[int], multipliers: Sequence[int]
) -> list[tuple[int, ...]]:
    """Spatial size of each level; ConfigError when the map cannot be halved that often."""
    field = f"{section}.multipliers"
    if not multipliers or min(multipliers) < 1:
        raise ConfigError(f"{field}={tuple(multipliers)}: expected one or more positive integers")
    halvings = len(multipliers) - 1
    possible = min((size & -size).bit_length() - 1 for size in space)
    if halvings > possible:
        shown = "x".join(map(str, space))
        raise ConfigError(
            f"{field}={tuple(multipliers)}: {shown} cannot be halved {halvings} times; "
            f"give at most {possible + 1} multipliers, or pad the data to a multiple of "
            f"{2**halvings}"
        )
    return [tuple(size >> level for size in space) for level in range(halvings + 1)]


def attended_levels(
    section: str, sizes: Sequence[tuple[int, ...]], resolutions: Sequence[int] | None
) -> frozenset[int]:
    """Levels whose longer side is among `resolutions`; ConfigError for one no level has."""
    sides = [max(size) for size in sizes]
    if resolutions is None:
        resolutions = [side for side in sides if side == 16]
    for resolution in resolutions:
        if resolution not in sides:
            near = min(sides, key=lambda side: abs(side - resolution))
            raise ConfigError(
                f"{section}.attention_resolutions={tuple(resolutions)}: no level has a side of "
                f"{resolution}; levels: {', '.join(map(str, sides))}; nearest: {near}"
            )
    return frozenset(level for level, side in enumerate(sides) if side in resolutions)


def head_count(section: str, width: int, heads: int, head_dim: int | None) -> int:
    """Number of attention heads of a level; ConfigError unless they divide its width."""
    if not head_dim:
        check_divides(f"{section}.heads", heads, width, "the width of an attention level")
        return heads
    check_divides(f"{section}.head_dim", head_dim, width, "the width of an attention level")
    return width // head_dim
