"""For tests, which compile much and compute little: a quick compiler, and draws by NumPy."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend import core

# Without optimisation, and with the older code generator, which takes a third less time.
OPTIONS = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
jit = functools.partial(jax.jit, compiler_options=OPTIONS)


def run(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, compiled as one program instead of one for each operation."""
    return jit(lambda *arguments: function(*arguments))(*arguments)


def normal(*shape: int, seed: int = 0) -> jax.Array:
    """Standard normal entries."""
    return jax.device_put(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def drawn(init: Callable[..., Any], move: float = 0.0, *, unit: bool = False) -> Any:
    """A start such as `init(key)` gives, with the random parts drawn by NumPy.

    To compile the draws of a small U-Net takes seconds. What does not depend on the key (zeros,
    ones) is the network's own; kernels are drawn with variance 1 / fan-in, all else that depends
    on the key with variance 1, as are with `unit` the kernels but those of a text encoder (EDM2).
    `move` times a standard normal is added to everything.
    """
    key = jax.random.key(0)
    traced, tree = jax.make_jaxpr(init, return_shape=True)(key)
    by_key = set(traced.jaxpr.invars)
    for equation in traced.jaxpr.eqns:
        names = {name for name in equation.invars if not isinstance(name, core.Literal)}
        if names & by_key:
            by_key.update(equation.outvars)
    random = [not isinstance(out, core.Literal) and out in by_key for out in traced.jaxpr.outvars]

    def fixed() -> list[jax.Array]:
        leaves = core.jaxpr_as_fun(traced)(key)
        return [leaf for leaf, drop in zip(leaves, random, strict=True) if not drop]

    rng, start = np.random.default_rng(0), iter(jit(fixed)())

    def fill(path: Any, leaf: Any, random: bool) -> np.ndarray:
        names = [entry.key for entry in path]
        values = next(start) if not random else rng.normal(size=leaf.shape)
        if random and names[-1] == "kernel" and (not unit or names[0] == "text"):
            stacked = "blocks" in names and leaf.ndim > 2
            values *= np.prod(leaf.shape[stacked:-1]) ** -0.5
        return np.asarray(values + move * rng.normal(size=leaf.shape), np.float32)

    paths, structure = jax.tree_util.tree_flatten_with_path(tree)
    return structure.unflatten(
        [fill(path, leaf, drop) for (path, leaf), drop in zip(paths, random, strict=True)]
    )
