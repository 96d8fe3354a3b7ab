"""Starting a run from the weights of another: what fits is taken, and what happened is said.

A parameter is taken when the other run has one of the same path and shape. So a new number of
classes, channels or positions costs the tables and layers that depend on it and nothing else.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from diffusion_jax import workdir
from diffusion_jax.checkpoints import Checkpointer
from diffusion_jax.errors import ConfigError

PyTree = Any
SHOWN = 8
"""Names in a line of the report at most."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transfer:
    """What of a stored tree goes into a new one; paths are `a/b/kernel`.

    Attributes:
        taken: paths of the new tree that are filled, with their sizes.
        fresh: paths of the new tree that keep their initial values, with the reason.
        dropped: paths of the stored tree that nothing takes.
    """

    taken: Mapping[str, int]
    fresh: Mapping[str, str]
    dropped: tuple[str, ...]

    def lines(self, total: int) -> list[str]:
        """The report: three lines at most; `total` is the number of values in the new tree."""
        share = 100.0 * sum(self.taken.values()) / max(total, 1)
        count = len(self.taken) + len(self.fresh)
        result = [f"taken: {len(self.taken)} of {count} parameters, {share:.1f}% of the values"]
        if self.fresh:
            result.append(f"fresh: {_some([f'{k} ({why})' for k, why in self.fresh.items()])}")
        if self.dropped:
            result.append(f"dropped: {_some(list(self.dropped))}")
        return result


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def paths(tree: PyTree) -> dict[str, Any]:
    """Path -> leaf, for a nested dict."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def plan(stored: PyTree, wanted: PyTree) -> Transfer:
    """Compares two trees of shapes."""
    have, want = paths(stored), paths(wanted)
    taken, fresh = {}, {}
    for path, leaf in want.items():
        if path not in have:
            fresh[path] = "new"
        elif tuple(have[path].shape) != tuple(leaf.shape):
            fresh[path] = f"{tuple(have[path].shape)} -> {tuple(leaf.shape)}"
        else:
            taken[path] = math.prod(leaf.shape)
    return Transfer(
        taken=taken, fresh=fresh, dropped=tuple(path for path in have if path not in taken)
    )


def take(folder: str | Path, params: PyTree) -> tuple[PyTree, list[str]]:
    """`params` with everything that fits of the averaged weights of another run.

    Args:
        folder: workdir of a run that holds a checkpoint.
        params: nested dict of arrays on their mesh; those that nothing fits are kept.

    Returns:
        the new tree, and the report in lines.

    Raises:
        ConfigError: no such workdir, no checkpoint in it, or nothing in it fits.
    """
    if not Path(folder).is_dir():
        raise ConfigError(f"config.init_from={folder}: no such folder; expected a workdir")
    config = workdir.read_config(folder)
    name = config.sampling.ema
    with Checkpointer(Path(folder) / workdir.CHECKPOINTS, read_only=True) as checkpoints:
        step = checkpoints.latest_step()
        tree = checkpoints.stored(step)
        stored = tree["ema"][name] if name else tree["params"]
        transfer = plan(stored, params)
        if not transfer.taken:
            raise ConfigError(
                f"config.init_from={folder}: none of its {len(paths(stored))} parameters fits "
                f"this network (config.network.name={config.network.name!r} there); expected a "
                "run of the same kind of network"
            )
        restored = checkpoints.restore_subtree(_part(params, stored, transfer.taken, name), step)
    found = restored["ema"][name] if name else restored["params"]
    flat = paths(found)

    def chosen(path: Any, leaf: Any) -> Any:
        found = flat.get(jax.tree_util.keystr(path, simple=True, separator="/"))
        return leaf if found is None else found.astype(leaf.dtype)

    merged = jax.tree_util.tree_map_with_path(chosen, params)
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    which = f"average {name!r}" if name else "raw weights"
    head = f"starts from {folder}, step {step}, {which}"
    return merged, [head, *transfer.lines(total)]


def _part(params: PyTree, stored: PyTree, taken: Mapping[str, int], name: str) -> dict[str, Any]:
    """What to restore: stored dtypes, shardings of `params`, nested as the checkpoint has it."""
    result: dict[str, Any] = {"ema": {name: {}}} if name else {"params": {}}
    top = result["ema"][name] if name else result["params"]
    dtypes = {path: leaf.dtype for path, leaf in paths(stored).items()}
    for path, leaf in paths(params).items():
        if path not in taken:
            continue
        *parents, last = path.split("/")
        section = top
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = jax.ShapeDtypeStruct(leaf.shape, dtypes[path], sharding=leaf.sharding)
    return result
