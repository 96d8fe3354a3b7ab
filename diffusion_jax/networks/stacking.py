"""Converts parameters between scanned blocks (one stacked tree) and unrolled ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def stack_blocks(params: Mapping[str, Any], name: str = "blocks") -> dict[str, Any]:
    """`{name: {"0": tree, "1": tree, ...}}` to `{name: tree with a leading block axis}`.

    At every depth of the tree: a network may hold several stacks, that of its text encoder too.
    """
    return _convert(params, name, _stack)


def unstack_blocks(params: Mapping[str, Any], name: str = "blocks") -> dict[str, Any]:
    """The inverse of `stack_blocks`."""
    return _convert(params, name, _unstack)


def _convert(tree: Any, name: str, change: Any) -> Any:
    if not isinstance(tree, Mapping):
        return tree
    return {
        key: change(value) if key == name else _convert(value, name, change)
        for key, value in tree.items()
    }


def _stack(blocks: Mapping[str, Any]) -> Any:
    ordered = [blocks[str(i)] for i in range(len(blocks))]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *ordered)


def _unstack(stacked: Mapping[str, Any]) -> Any:
    depth = jax.tree.leaves(stacked)[0].shape[0]
    return {str(i): jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(depth)}
