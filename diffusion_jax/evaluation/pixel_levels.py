"""How many values a pixel has, as the bound on the probability of an image needs to know."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from diffusion_jax.errors import ConfigError

LOOKED_AT = 64
"""Examples that the number is found in."""
_CLOSE = 1e-3
"""How far from a value a pixel may lie, in steps between values; more of them are less exact."""
_ROUNDINGS = 4.0
"""Of float32, that the place of a pixel among its values may be off by."""


def check_levels(levels: Any) -> None:
    """Raises ConfigError unless `levels` is None, a number of values, or 0 for a density."""
    whole = isinstance(levels, int | np.integer) and not isinstance(levels, bool)
    if levels is not None and (not whole or levels < 0 or levels == 1):
        raise ConfigError(f"levels={levels!r}: expected 2 or more, or 0 for a density")


def levels_of(source: Any, levels: int | None = None) -> int:
    """The number of values that a pixel of the source's images has; 0 for other data.

    Found in its first examples, so that every process and any batch size finds the same.

    Args:
        source: of the data, with `spec`, `len` and `fetch`.
        levels: what it is taken to be; None finds it.

    Raises:
        ConfigError: a number for data without pixels, or none that fits.
    """
    spec = source.spec
    if spec.kind != "image":
        if levels:
            raise ConfigError(f"levels={levels}: {spec.kind} have no pixels; expected None")
        return 0
    if levels is not None:
        return levels
    first = source.fetch(np.arange(min(LOOKED_AT, len(source))))
    values = np.unique(np.asarray(first["x"], np.float64))
    for count in range(2, 257):
        if float(off_grid(values, count, spec.range)) < _CLOSE:
            return count
    raise ConfigError(
        "levels=None: the pixels are not on 2 to 256 values in equal steps; expected their "
        "number, or 0 for a density"
    )


def off_grid(x: Any, count: int, ends: tuple[float, float], axis: Any = None) -> Any:
    """The furthest that a value lies from `count` values in equal steps between the ends, in
    steps, over `axis`; inside a compiled program too."""
    xp = np if isinstance(x, np.ndarray) else jnp
    steps = (x - ends[0]) / (ends[1] - ends[0]) * (count - 1)
    return xp.abs(steps - xp.clip(xp.rint(steps), 0, count - 1)).max(axis)


def check_grid(furthest: np.ndarray, levels: int, asked: int | None) -> None:
    """Raises ConfigError where an example's `off_grid` says that its pixels have other values."""
    close = max(_CLOSE, _ROUNDINGS * float(np.finfo(np.float32).eps) * levels)
    if not (furthest < close).all():
        how = f"found in the first {LOOKED_AT} examples" if asked is None else "given"
        raise ConfigError(
            f"levels={levels} ({how}): some pixels lie between them; expected their number, "
            "such as 256, or 0 for a density"
        )
