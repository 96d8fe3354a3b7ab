"""Comparison of a stored tree with the one a config asks for, parameter by parameter."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.parallel.sharding import path_name

LISTED = 3


def describe_mismatch(expected: Any, stored: Any, *, partial: bool = False) -> list[str]:
    """One line for each array whose presence, shape or dtype differs; empty when all agree.

    Args:
      expected: tree of arrays or `jax.ShapeDtypeStruct`.
      stored: the tree in the checkpoint, from `Checkpointer.stored`.
      partial: whether `expected` may be a part of what is stored.
    """
    wanted, found = _by_path(expected), _by_path(stored)
    lines = []
    for path, array in wanted.items():
        if path not in found:
            lines.append(f"{path}: not stored, expected {array}")
        elif found[path] != array:
            lines.append(f"{path}: stored {found[path]}, expected {array}")
    if not partial:
        lines += [f"{p}: stored {a}, not expected" for p, a in found.items() if p not in wanted]
    return lines


def summarise(lines: list[str]) -> str:
    """The first few differences in one line."""
    more = f"; and {len(lines) - LISTED} more" if len(lines) > LISTED else ""
    return "; ".join(lines[:LISTED]) + more


def _by_path(tree: Any) -> dict[str, str]:
    """`float32(3, 4)` for each array; a typed key is stored as the integers it is made of."""
    names = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        names[path_name(path)] = f"{np.dtype(leaf.dtype).name}{tuple(leaf.shape)}"
    return names
