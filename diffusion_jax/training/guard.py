"""The non-finite guard: skips an update that is not finite, and leaves the limit to the host.

The decision is made inside the compiled step, so that no NaN ever reaches parameters, optimizer,
averages or the objective's state; the counters travel with the state and survive a restart.
`optax.apply_if_finite` is not used because it lets a NaN through once its limit is reached.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int

PyTree = Any
Counters = dict[str, Any]


def init() -> Counters:
    """Counters of a fresh run: updates skipped in all, and in a row."""
    return {"skipped": jnp.zeros((), jnp.int32), "consecutive": jnp.zeros((), jnp.int32)}


def is_finite(*trees: PyTree) -> Bool[Array, ""]:
    """Whether every floating number in `trees` is finite, judged by their norms."""
    finite = jnp.bool_(True)
    for tree in trees:
        floating = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
        finite &= jnp.isfinite(optax.tree.norm(floating))
    return finite


def select(finite: Bool[Array, ""], new: PyTree, old: PyTree) -> PyTree:
    """`new` where the update is finite, otherwise `old`, leaf by leaf."""
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)


def count(counters: Counters, finite: Bool[Array, ""]) -> dict[str, Int[Array, ""]]:
    """Counters after an update."""
    bad = jnp.where(finite, 0, 1).astype(jnp.int32)
    return {
        "skipped": counters["skipped"] + bad,
        "consecutive": jnp.where(finite, 0, counters["consecutive"] + 1),
    }
