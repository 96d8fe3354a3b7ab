"""The device mesh of four named axes and the shardings every batch uses.

`data` replicates the parameters and splits the batch, `fsdp` splits both, `context` splits long
token sequences and `tensor` splits the wide axes of a layer. A batch is therefore sharded over
("data", "fsdp") together and replicated over the other two.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from diffusion_jax.errors import ConfigError

AXES: tuple[str, ...] = ("data", "fsdp", "context", "tensor")
BATCH_AXES: tuple[str, ...] = ("data", "fsdp")


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    context: int = 1,
    tensor: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """Returns a mesh over all `devices` (default: every device of every process).

    At most one axis may be -1: it takes the devices that the other axes leave.

    Raises:
      ConfigError: if the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = dict(zip(AXES, (data, fsdp, context, tensor), strict=True))
    shape = resolve_axes(sizes, len(devices))
    # Any shape that multiplies is allowed, so logical axes may have to split a physical TPU axis.
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def resolve_axes(sizes: Mapping[str, int], device_count: int) -> tuple[int, ...]:
    """Replaces -1 in `sizes` (keys `AXES`) and checks the product against `device_count`."""
    for axis, size in sizes.items():
        if size < 1 and size != -1:
            raise ConfigError(
                f"mesh.{axis}={size} is no axis size; expected a positive number, or -1 for the "
                f"devices that the other axes leave"
            )
    free = [axis for axis in AXES if sizes[axis] == -1]
    if len(free) > 1:
        raise ConfigError(
            f"mesh.{free[1]}=-1, but mesh.{free[0]} is -1 already; only one axis can take the rest "
            f"of the {device_count} devices; nearest: mesh.{free[1]}=1"
        )
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if device_count % fixed or (not free and fixed != device_count):
        raise ConfigError(_mesh_message(sizes, device_count))
    return tuple(device_count // fixed if sizes[axis] == -1 else sizes[axis] for axis in AXES)


def _mesh_message(sizes: Mapping[str, int], device_count: int) -> str:
    asked = [axis for axis in AXES if sizes[axis] not in (1, -1)] or ["data"]
    product = " x ".join(f"mesh.{axis}={sizes[axis]}" for axis in asked)
    total = math.prod(sizes[axis] for axis in asked)
    total_text = f" = {total}" if len(asked) > 1 else ""
    wanted = "divide" if -1 in sizes.values() else "equal"
    best = _nearest_axes(sizes, device_count)
    changed = ", ".join(f"mesh.{a}={best[a]}" for a in AXES if sizes[a] not in (-1, best[a]))
    return (
        f"{product}{total_text} does not {wanted} the device count {device_count}; "
        f"nearest: {changed}"
    )


def _nearest_axes(sizes: Mapping[str, int], device_count: int) -> dict[str, int]:
    """The valid axes that change the fewest of the given sizes, and those the least."""
    divisors = [d for d in range(1, device_count + 1) if device_count % d == 0]

    def distance(candidate: tuple[int, ...]) -> tuple[int, float]:
        pairs = [(sizes[a], c) for a, c in zip(AXES, candidate, strict=True) if sizes[a] != -1]
        changes = sum(size != c for size, c in pairs)
        return changes, sum(abs(math.log(size / c)) for size, c in pairs)

    candidates = (
        (device_count // math.prod(rest), *rest)
        for rest in itertools.product(divisors, repeat=len(AXES) - 1)
        if device_count % math.prod(rest) == 0
    )
    return dict(zip(AXES, min(candidates, key=distance), strict=True))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis over ("data", "fsdp"); everything else replicated."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts the mesh cuts a batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch_size(batch_size: int, accumulation: int, mesh: Mesh) -> None:
    """Checks that every micro-batch divides over the mesh, and so over the processes.

    Raises:
      ConfigError: naming the nearest batch sizes that do.
    """
    shards = batch_shards(mesh)
    if accumulation < 1:
        raise ConfigError(f"accumulation={accumulation} must be at least 1")
    multiple = accumulation * shards
    if batch_size >= 1 and batch_size % multiple == 0:
        return
    below, above = batch_size // multiple * multiple, (batch_size // multiple + 1) * multiple
    choices = [str(size) for size in (below, max(above, multiple)) if size > 0]
    raise ConfigError(
        f"batch_size={batch_size} does not divide by {multiple} (accumulation {accumulation} x "
        f"{shards} batch shards of the mesh); nearest: {' or '.join(choices)}"
    )


def process_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Rows of the global batch, int64 in ascending order, that this process has to supply.

    Processes whose devices differ only in `context` or `tensor` supply the same rows.
    """
    index_map = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    slices = {index[0].indices(batch_size) for index in index_map.values() if index is not None}
    return np.unique(np.concatenate([np.arange(*bounds) for bounds in slices])).astype(np.int64)
