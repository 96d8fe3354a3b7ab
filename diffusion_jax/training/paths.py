"""What a parameter is, judged by its path and shape: the axes that are one weight of one layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax

from diffusion_jax.parallel.sharding import STACKED, path_name

PyTree = Any
OBJECTIVE_PARAMS = r"^objective/"
"""Parameters of the objective, such as a projection; see `objectives.base.OBJECTIVE`."""


def map_with_names(function: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """`jax.tree.map` of `function(path, leaf, ...)`, the path as text: `blocks/qkv/kernel`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(path_name(path), *leaves), tree, *rest
    )


def stacked_axes(path: str) -> int:
    """1 where axis 0 counts the layers of a scanned stack, which are weights of their own."""
    return 1 if re.search(STACKED, path) else 0


def layer_ndim(path: str, leaf: Any) -> int:
    """Axes of the parameter of one layer: 1 for a bias, also where the layers are stacked."""
    return leaf.ndim - stacked_axes(path)


def input_axes(path: str, leaf: Any) -> tuple[int, ...]:
    """The axes over which one unit (one output channel) of a layer sums: all but the last.

    Of a vector (bias, norm) the whole is one unit.
    """
    first, last = stacked_axes(path), leaf.ndim
    return tuple(range(first, last - 1 if last - first > 1 else last))


def first_match(path: str, named: Sequence[Any]) -> Any | None:
    """The first of the groups (with a `pattern`) whose pattern is found in the path, or None."""
    return next((group for group in named if re.search(group.pattern, path)), None)
