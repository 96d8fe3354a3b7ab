"""Which axis of which array goes over which axis of the mesh.

A rule looks at the path and the shape alone, so that everything shaped like a parameter (gradient,
optimizer moment, EMA) is placed exactly like it and no update moves data between devices.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusion_jax.errors import ConfigError

# Smaller arrays stay whole: gathering them costs more latency than their memory is worth.
MIN_SIZE = 2**14

# Arrays under `blocks/` are stacked along axis 0, which scan slices: that axis stays whole. A
# number after `blocks/` is an unstacked block (one that is not scanned).
STACKED = r"(^|/)blocks/(?!\d)"

# Megatron-style pairs (Shoeybi et al. 2019, arXiv:1909.08053): the first product of a pair splits
# its outputs, the second its inputs, so that one all-reduce follows the pair. The axes are those
# of the array without its stacked axis.
TENSOR_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"(^|/)blocks/.*(qkv|/q|/kv|fc1|ada)/kernel$", (None, "tensor")),
    (r"(^|/)blocks/.*(out|fc2)/kernel$", ("tensor", None)),
    # The two convolutions of a residual block, of one to three spatial axes.
    *((r"(^|/)blocks/.*conv1/kernel$", (*(None,) * axes, None, "tensor")) for axes in (1, 2, 3)),
    *((r"(^|/)blocks/.*conv2/kernel$", (*(None,) * axes, "tensor", None)) for axes in (1, 2, 3)),
)


def path_name(path: tuple[Any, ...]) -> str:
    """A tree path as text: `params/blocks/qkv/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def spec_for(
    path: str,
    shape: Sequence[int],
    mesh: Mesh,
    *,
    min_size: int = MIN_SIZE,
    stacked: str = STACKED,
    rules: Sequence[tuple[str, Sequence[str | None]]] = TENSOR_RULES,
) -> PartitionSpec:
    """The tensor rule that matches first, then the largest free axis that `fsdp` divides.

    Args:
      path: path of the array in its tree, `/` between the parts.
      shape: global shape.
      mesh: a mesh with axes `fsdp` and `tensor`.
      min_size: arrays with fewer elements are not split over `fsdp`.
      stacked: pattern of paths whose axis 0 is sliced by scan and never sharded.
      rules: pairs of a pattern and the mesh axes of the array without its stacked axis.

    Raises:
      ConfigError: if a tensor rule applies to an axis that mesh.tensor does not divide.
    """
    first = 1 if re.search(stacked, path) else 0
    axes: list[str | None] = [None] * len(shape)
    if mesh.shape["tensor"] > 1:
        for pattern, rule in rules:
            if len(shape) == first + len(rule) and re.search(pattern, path):
                axes[first:] = rule
                _check_divides(path, shape, axes, mesh)
                break
    fsdp = mesh.shape["fsdp"]
    if fsdp > 1 and math.prod(shape) >= min_size:
        free = [i for i in range(first, len(shape)) if axes[i] is None and shape[i] % fsdp == 0]
        if free:
            axes[max(free, key=lambda i: shape[i])] = "fsdp"
    while axes and axes[-1] is None:
        axes.pop()
    return PartitionSpec(*axes)


def _check_divides(path: str, shape: Sequence[int], axes: Sequence[str | None], mesh: Mesh) -> None:
    tensor = mesh.shape["tensor"]
    for i, axis in enumerate(axes):
        if axis == "tensor" and shape[i] % tensor:
            common = math.gcd(shape[i], mesh.size)
            near = max(d for d in range(1, tensor) if common % d == 0)
            raise ConfigError(
                f"mesh.tensor={tensor} does not divide axis {i} of {path}, shape {tuple(shape)}; "
                f"nearest: mesh.tensor={near}"
            )


def shardings_for(tree: Any, mesh: Mesh, **options: Any) -> Any:
    """A tree like `tree` (arrays or `jax.ShapeDtypeStruct`) of `NamedSharding`.

    Works on parameters and on everything that carries their paths: a whole train state with
    optimizer moments and EMA. Scalars are replicated. `options` are those of `spec_for`.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(
            mesh, spec_for(path_name(path), leaf.shape, mesh, **options)
        ),
        tree,
    )


def with_shardings(abstract: Any, shardings: Any) -> Any:
    """`abstract` (from `jax.eval_shape`) as `ShapeDtypeStruct` leaves that carry `shardings`.

    This is what ahead-of-time compilation and `Checkpointer.restore` take.
    """
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        shardings,
    )
