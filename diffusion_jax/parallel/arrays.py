"""Between host arrays and global device arrays, for one process or many."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from diffusion_jax.parallel.mesh import batch_sharding, batch_shards, process_rows
from diffusion_jax.parallel.sharding import path_name

# Example ids are 64-bit and no device needs them: the host keeps them for reports.
HOST_KEYS = ("id",)


def global_batch(local: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Turns the rows that this process supplies into global arrays sharded over the batch.

    Args:
      local: (nested) mapping of NumPy arrays with the rows of `mesh.process_rows` in that order.
        Entries in `HOST_KEYS` and text are left out: they stay on the host. The arrays must not be
        written to afterwards: on a CPU the result may share their memory.
      mesh: the mesh of the train step.

    Returns:
      The same (nested) dict with `jax.Array` leaves over the whole batch.

    Raises:
      ValueError: for a 64-bit array, which the device would silently cut to 32 bits, and for a
        number of rows that the mesh does not divide.
    """
    sharding, parts = batch_sharding(mesh), batch_shards(mesh)
    share = len(process_rows(mesh, parts))
    entries = _device_entries(local, share)
    if jax.process_count() == 1:
        return jax.device_put(entries, sharding)  # one call for all leaves costs least
    return jax.tree.map(
        lambda value: jax.make_array_from_process_local_data(
            sharding, value, (value.shape[0] // share * parts, *value.shape[1:])
        ),
        entries,
    )


def _device_entries(batch: Mapping[str, Any], share: int, prefix: str = "") -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, value in batch.items():
        if isinstance(value, Mapping):
            kept[name] = _device_entries(value, share, f"{prefix}{name}/")
        elif name not in HOST_KEYS and (array := np.asarray(value)).dtype.kind not in "OSUT":
            _check_entry(prefix + name, array, share)
            kept[name] = array
    return kept


def _check_entry(name: str, value: np.ndarray, share: int) -> None:
    if jax.dtypes.canonicalize_dtype(value.dtype) != value.dtype:
        raise ValueError(f"batch {name} has dtype {value.dtype}; expected at most 32 bits")
    if value.ndim == 0 or value.shape[0] % share:
        raise ValueError(
            f"batch {name} has shape {value.shape}; expected its first axis to divide by {share}, "
            f"the batch shards of this process"
        )


def to_host(tree: Any) -> Any:
    """NumPy copies of replicated or locally held arrays, without talking to other processes.

    Raises:
      ValueError: for an array of which other processes hold a part; `gather` reads those.
    """
    return jax.tree_util.tree_map_with_path(_local_value, tree)


def _local_value(path: tuple[Any, ...], leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf)
    if leaf.is_fully_addressable:
        return np.asarray(leaf)
    if leaf.is_fully_replicated:
        return np.asarray(leaf.addressable_data(0))
    raise ValueError(
        f"{path_name(path)} with shape {leaf.shape} is sharded over several processes; expected a "
        f"replicated array; use gather, in every process, to read it"
    )


def gather(tree: Any) -> Any:
    """NumPy copies of whole global arrays in every process. A collective: all must call it."""
    return jax.tree.map(
        lambda leaf: (
            np.asarray(leaf)
            if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable
            else np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
        ),
        tree,
    )
