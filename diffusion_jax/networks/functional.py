"""From a module that constructs to two pure functions: `init(key)` and `apply(params, ...)`.

A module is built once, abstractly, and split into its static part and its parameters. From then
on parameters are a plain nested dict of arrays with string keys, which every other part of the
trainer (optimizer, EMA, checkpoints, sharding) treats as an ordinary pytree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Key

Params = dict[str, Any]


def _unchanged(params: Params) -> Params:
    return params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """A network without its parameters.

    Attributes:
        init: `init(key) -> params`, a nested dict of float32 arrays. Pure: run it under `jax.jit`
            with `out_shardings` so that no device holds the whole, or under `jax.eval_shape`.
        apply: `apply(params, x, noise, conditioning, *, key=None) -> output`, float32, batch first.
            `noise` is `[b]` in the unit that `noise_input` names; `conditioning` maps names to
            arrays with a leading batch axis; `key` (scalar, or one per example) turns dropout on.
            Networks with inner features take `return_features=True` -> (output, features).
        noise_input: what `noise` must hold: `logsnr`, `t`, `c_noise` or `timestep`.
        post_update: `post_update(params) -> params`, to be applied after each update; entries
            beside the network's own pass through. The identity for most networks.
    """

    init: Callable[[Key[Array, ""]], Params]
    apply: Callable[..., Any]
    noise_input: str
    post_update: Callable[[Params], Params] = _unchanged


def functional(make: Callable[..., nnx.Module]) -> Network:
    """Splits the module that `make` builds into pure functions.

    Args:
        make: called as `make(rngs=...)`, such as `functools.partial(UNet, (32, 32, 3))`. The module
            has an attribute `noise_input` and the call signature of `Network.apply`, less params;
            its method `post_update`, where there is one, becomes the network's.

    Raises:
        ConfigError: the module's sizes cannot work (from its constructor, before any compile).
        ValueError: the module keeps state besides parameters, or a parameter is not float32.
    """
    module: Any = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    graphdef, parameters, rest = nnx.split(module, nnx.Param, ...)
    if jax.tree.leaves(rest):
        raise ValueError(f"a network may hold parameters alone, but this one keeps {rest}")
    for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(parameters)):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if leaf.dtype != jnp.float32:
            raise ValueError(f"parameter {name} has dtype {leaf.dtype}; expected float32")
        if not all(isinstance(getattr(entry, "key", None), str) for entry in path):
            raise ValueError(f"parameter {name} is stored under a key that is not a string")

    def init(key: Key[Array, ""]) -> Params:
        return nnx.to_pure_dict(nnx.state(make(rngs=nnx.Rngs(key)), nnx.Param))

    def apply(
        params: Mapping[str, Any],
        x: Array,
        noise: Array,
        conditioning: Mapping[str, Array],
        *,
        key: Array | None = None,
        **options: Any,
    ) -> Any:
        return nnx.merge(graphdef, params)(x, noise, conditioning, key=key, **options)

    post_update = getattr(module, "post_update", _unchanged)
    return Network(init=init, apply=apply, noise_input=module.noise_input, post_update=post_update)
