"""Converts parameters between scanned blocks (one stacked tree) and unrolled ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def stack_blocks(params: Mapping[str, Any], name: str = "blocks") -> dict[str, Any]:
    """`{name: {"0": tree, "1": tree, ...}}` to `{name: tree with a leading block axis}`."""
    blocks = [params[name][str(i)] for i in range(len(params[name]))]
    return {**params, name: jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}


def unstack_blocks(params: Mapping[str, Any], name: str = "blocks") -> dict[str, Any]:
    """The inverse of `stack_blocks`."""
    stacked = params[name]
    depth = jax.tree.leaves(stacked)[0].shape[0]
    blocks = {str(i): jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(depth)}
    return {**params, name: blocks}
