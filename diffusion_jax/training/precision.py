"""How parameters are kept between updates: float32, or half of that.

- "float32": parameters are float32.
- "masters": the network computes with bfloat16 parameters, which are the float32 masters rounded
  to the nearest after each update. The masters lie in the optimizer state; 6 bytes a parameter.
- "stochastic": there are bfloat16 parameters only. After an update, made in float32, each is
  rounded up or down with the probability that leaves its expectation as it was (Gupta et al.
  2015): small updates are not lost, they come to pass now and then. 2 bytes a parameter.

In all of them updates (decay, clipping, post-update) are made in float32, gradients are summed over
micro-batches in float32, and optimizer moments and averages are float32; with bfloat16 parameters
the gradient of each micro-batch is bfloat16. Averages are made of the float32 parameters that an
update ends with, before they are rounded.

Vectors (biases, norms) and the objective's own parameters stay float32: they are a thousandth of
the memory, and the functions they shape are delicate.

The rounding of parameter P at step n is a function of (seed, n, P's path): a resumed run repeats
it, and neither the mesh nor other parameters change it.
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Key

from diffusion_jax.errors import ConfigError, unknown_name
from diffusion_jax.training.paths import OBJECTIVE_PARAMS, layer_ndim, map_with_names

PyTree = Any
PRECISIONS = ("float32", "masters", "stochastic")


@dataclasses.dataclass(frozen=True)
class Precision:
    """One of `PRECISIONS`.

    Attributes:
        name: which.
        keep: regular expression of the paths of parameters that stay float32 beside the vectors.
    """

    name: str = "float32"
    keep: str = OBJECTIVE_PARAMS

    def __post_init__(self) -> None:
        if self.name not in PRECISIONS:
            raise ConfigError(unknown_name("optimizer.precision", self.name, PRECISIONS))

    def extra_state(self, full: PyTree) -> dict[str, PyTree]:
        """What the optimizer state keeps beside the optimizer's own: the masters, if any."""
        return {"masters": full} if self.name == "masters" else {}

    def full(self, params: PyTree, extra_state: Any) -> PyTree:
        """The float32 parameters that an update starts from."""
        if self.name == "masters":
            return extra_state["masters"]
        return as_float32(params)

    def stored(self, full: PyTree, key: Key[Array, ""]) -> PyTree:
        """The parameters as the network gets them.

        Args:
            full: float32 parameters.
            key: of this step; each parameter folds its path in.
        """
        if self.name == "float32":
            return full

        def store(path: str, value: Any) -> Any:
            if not self._is_low(path, value):
                return value
            if self.name == "masters":
                return value.astype(jnp.bfloat16)
            own = jax.random.fold_in(key, zlib.crc32(path.encode()))
            return round_stochastically(value, own)

        return map_with_names(store, full)

    def _is_low(self, path: str, value: Any) -> bool:
        return layer_ndim(path, value) > 1 and not re.search(self.keep, path)


def as_float32(tree: PyTree) -> PyTree:
    """All floating arrays of a tree as float32; the others as they are."""
    return jax.tree.map(
        lambda a: a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree
    )


def round_stochastically(
    values: Float[Array, "*shape"], key: Key[Array, ""]
) -> BFloat16[Array, "*shape"]:
    """bfloat16 neighbours of float32 values, drawn so that their expectation is the value.

    A bfloat16 is the upper half of a float32: a uniform number added to the lower half carries
    into the upper one with just the right probability. What bfloat16 can represent stays as it is,
    infinities too.
    """
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    noise = jax.random.bits(key, values.shape, jnp.uint16).astype(jnp.uint32)
    # The carry of a NaN's mantissa would make another number of it.
    upper = jnp.where(jnp.isnan(values), bits, bits + noise) >> 16
    return jax.lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)
