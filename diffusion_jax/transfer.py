"""Starting a run from the weights of another: what fits is taken, and what happened is said.

A parameter is taken when the other run has one of the same path and shape. So a new number of
classes, channels or pixels costs the tables and layers that depend on it and nothing else; and of
two of these the part that has a meaning in both runs is kept: the rows of classes that are called
alike, and learned positions, interpolated to the new grid. Optimizer, averages and step start
afresh.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from diffusion_jax import start, workdir
from diffusion_jax.builders import PRESETS
from diffusion_jax.checkpoints import Checkpointer
from diffusion_jax.config import Config
from diffusion_jax.data import DataSpec
from diffusion_jax.errors import ConfigError, check_local
from diffusion_jax.training.compiled import CompiledTrainer
from diffusion_jax.training.state import TrainState

PyTree = Any
SHOWN = 8
"""Names in a line of the report at most."""
LABELS = r"(^|/)label/table$"
POSITIONS = "positions"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """How a parameter of another shape, or of other rows, is made to fit.

    Attributes:
        kind: "resized" or "in part", the line of the report.
        what: for that line.
        apply: `(stored, fresh) -> new`, of arrays.
    """

    kind: str
    what: str
    apply: Callable[[Any, Any], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transfer:
    """What of a stored tree goes into a new one; paths are `a/b/kernel`.

    Attributes:
        taken: paths of the new tree that are filled, with their sizes.
        changed: paths that are filled otherwise than value by value.
        fresh: paths of the new tree that keep their initial values, with the reason.
        dropped: paths of the stored tree that nothing takes.
    """

    taken: Mapping[str, int]
    changed: Mapping[str, Change]
    fresh: Mapping[str, str]
    dropped: tuple[str, ...]

    def lines(self, total: int) -> list[str]:
        """The report: five lines at most; `total` is the number of values in the new tree."""
        share = 100.0 * sum(self.taken.values()) / max(total, 1)
        count = len(self.taken) + len(self.changed) + len(self.fresh)
        result = [f"taken: {len(self.taken)} of {count} parameters, {share:.1f}% of the values"]
        for kind in ("resized", "in part"):
            found = [f"{k} ({c.what})" for k, c in self.changed.items() if c.kind == kind]
            result += [f"{kind}: {_some(found)}"] if found else []
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


Adapt = Callable[[str, Any, Any], Change | str | None]
"""`(path, stored, wanted) -> Change`, or why it cannot be taken, or None where shapes decide."""


def plan(stored: PyTree, wanted: PyTree, adapt: Adapt = lambda path, old, new: None) -> Transfer:
    """Compares two trees of shapes."""
    have, want = paths(stored), paths(wanted)
    taken, changed, fresh = {}, {}, {}
    for path, leaf in want.items():
        found = adapt(path, have[path], leaf) if path in have else None
        if isinstance(found, Change):
            changed[path] = found
        elif isinstance(found, str):
            fresh[path] = found
        elif path not in have:
            fresh[path] = "new"
        elif tuple(have[path].shape) != tuple(leaf.shape):
            fresh[path] = f"{tuple(have[path].shape)} -> {tuple(leaf.shape)}"
        else:
            taken[path] = math.prod(leaf.shape)
    dropped = tuple(path for path in have if path not in taken and path not in changed)
    return Transfer(taken=taken, changed=changed, fresh=fresh, dropped=dropped)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Side:
    """What the rows of tables mean in one of the two runs.

    Attributes:
        classes: names of the labels; empty where they have none.
        null_last: whether the table of the labels ends with a row for no class.
        tokens: of the learned positions, before those of the patches.
        grid: patches along each axis; None for networks without patches.
    """

    classes: tuple[str, ...]
    null_last: bool
    tokens: tuple[str, ...]
    grid: tuple[int, ...] | None

    @classmethod
    def of(cls, config: Config, spec: DataSpec) -> Side:
        """That of a run."""
        name = config.network.name
        grid, tokens = None, ()
        if name in ("dit", "uvit"):
            own = config.network[name]
            patch = PRESETS[name](own.preset)["patch"] if own.preset else own.patch
            grid = tuple(size // patch for size in spec.shape[:-1])
        if name == "uvit":
            labels = config.network.use_labels and spec.num_classes > 0
            present = {"noise": True, "label": labels, "scalar": bool(spec.scalars)}
            tokens = tuple(token for token, used in present.items() if used)
        # The others have their null by itself, `label/null`.
        null_last = name == "edm2"
        return cls(classes=tuple(spec.classes), null_last=null_last, tokens=tokens, grid=grid)


def adapter(old: Side, new: Side) -> Adapt:
    """Keeps the rows that have a meaning in both runs."""

    def adapt(path: str, stored: Any, wanted: Any) -> Change | str | None:
        if tuple(stored.shape[1:]) != tuple(wanted.shape[1:]):
            return None
        if re.search(LABELS, path) and old.classes and new.classes:
            return _classes(old.classes, new.classes, old.null_last and new.null_last)
        if path == POSITIONS and old.grid and new.grid:
            return _positions(old, new)
        return None

    return adapt


def _classes(old: tuple[str, ...], new: tuple[str, ...], null_last: bool) -> Change | str | None:
    if old == new:
        return None
    shared = [name for name in new if name in old]
    if not shared and not null_last:
        return "other classes"
    last = [-1] if null_last else []
    to = jnp.array([new.index(name) for name in shared] + last)
    out_of = jnp.array([old.index(name) for name in shared] + last)
    found = f"{len(shared)} of {len(new)} classes have a row, by name"
    return Change(
        kind="in part",
        what=f"{found}; so has no class" if null_last else found,
        apply=lambda stored, fresh: fresh.at[to].set(stored[out_of]),
    )


def _positions(old: Side, new: Side) -> Change | str | None:
    if old.grid is None or new.grid is None or (old.tokens, old.grid) == (new.tokens, new.grid):
        return None
    if len(old.grid) != len(new.grid):
        return f"{len(old.grid)} axes -> {len(new.grid)}"
    before, after = old.grid, new.grid

    def apply(stored: Any, fresh: Any) -> Any:
        for token in new.tokens:
            if token in old.tokens:
                row = stored[old.tokens.index(token)]
                fresh = fresh.at[new.tokens.index(token)].set(row)
        dim = stored.shape[-1]
        patches = stored[len(old.tokens) :].reshape(*before, dim)
        patches = jax.image.resize(patches, (*after, dim), "linear").reshape(-1, dim)
        return fresh.at[len(new.tokens) :].set(patches)

    shown = " -> ".join("x".join(map(str, grid)) for grid in (before, after))
    return Change(kind="resized", what=shown, apply=apply)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beginning:
    """Weights of another run that wait to become the first state.

    Attributes:
        found: what is taken.
        report: the same, in lines.
        make: reads the arrays and makes the state; every process must call it.
    """

    found: Transfer
    report: tuple[str, ...]
    make: Callable[[], TrainState]

    def __call__(self) -> TrainState:
        """The state; process 0 says what was taken."""
        state = self.make()
        if jax.process_index() == 0:
            print(*self.report, sep="\n", flush=True)
        return state


def begin(
    config: Config, folder: Path, spec: DataSpec, compiled: CompiledTrainer
) -> Beginning | None:
    """The first state of a run that starts from another one; None where none does.

    Compares shapes at once and reads arrays when it is called, which all processes must do.

    Args:
        config: of the new run.
        folder: its workdir; one that holds a checkpoint starts from that.
        spec: its data.
        compiled: its training step.

    Raises:
        ConfigError: no such workdir, no checkpoint in it, or nothing in it fits.
    """
    if not config.init_from or start.newest(folder) is not None:
        return None
    field = f"config.init_from={config.init_from}"
    check_local("config.init_from", config.init_from)
    source = workdir.folder_of(config.init_from)
    if not source.is_dir():
        raise ConfigError(f"{field}: no such folder; expected the workdir of a trained run")
    if source.resolve() == folder.resolve():
        raise ConfigError(f"{field} is the workdir itself; expected that of another run")
    try:
        other, seen = workdir.read_config(source), workdir.read_spec(source)
        checkpoints = Checkpointer(source / workdir.CHECKPOINTS, read_only=True)
        with checkpoints:
            step = checkpoints.latest_step()
            tree = checkpoints.stored(step)
    except ConfigError as error:
        raise ConfigError(f"{field}: {error}") from error
    _check_alike(field, config, other)
    name = other.sampling.ema
    stored = tree["ema"][name] if name else tree["params"]
    wanted = compiled.abstract_state.params
    found = plan(stored, wanted, adapter(Side.of(other, seen), Side.of(config, spec)))
    if not found.taken:
        raise ConfigError(
            f"{field}: none of its {len(paths(stored))} parameters fits this network; expected a "
            "run of the same sizes"
        )
    which = f"average {name!r}" if name else "raw weights"
    head = f"starts from {source}, step {step}, {which}"
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(wanted))
    make = functools.partial(_first_state, checkpoints, step, stored, name, found, compiled)
    return Beginning(found=found, report=(head, *found.lines(total)), make=make)


def _check_alike(field: str, config: Config, other: Config) -> None:
    name = config.network.name
    if other.network.name != name:
        raise ConfigError(
            f"{field}: its network is {other.network.name!r}, this one {name!r}; expected a run of "
            "the same kind of network"
        )
    scans = [c.network[name].get("scan") for c in (other, config)]
    if scans[0] != scans[1]:
        raise ConfigError(
            f"config.network.{name}.scan={scans[1]}: the blocks of {field.partition('=')[2]} are "
            f"kept with scan={scans[0]}; expected the same"
        )


def _first_state(
    checkpoints: Checkpointer,
    step: int | None,
    stored: PyTree,
    name: str,
    found: Transfer,
    compiled: CompiledTrainer,
) -> TrainState:
    """Restores what is taken and puts it among fresh parameters."""
    params = compiled.initial_params()
    with checkpoints:
        restored = checkpoints.restore_subtree(_part(params, stored, found, name), step)
    arrays = paths(restored["ema"][name] if name else restored["params"])

    def chosen(path: Any, leaf: Any) -> Any:
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        if where not in arrays:
            return leaf
        if where in found.changed:
            apply = jax.jit(found.changed[where].apply, out_shardings=leaf.sharding)
            return apply(arrays[where].astype(leaf.dtype), leaf)
        return arrays[where].astype(leaf.dtype)

    return compiled.init(jax.tree_util.tree_map_with_path(chosen, params))


def _part(params: PyTree, stored: PyTree, found: Transfer, name: str) -> dict[str, Any]:
    """What to restore: stored shapes and dtypes, on the mesh of `params`, nested as the checkpoint
    has it. Arrays of another shape are tables: they are whole on every device."""
    result: dict[str, Any] = {"ema": {name: {}}} if name else {"params": {}}
    top = result["ema"][name] if name else result["params"]
    have = paths(stored)
    for path, leaf in paths(params).items():
        if path not in found.taken and path not in found.changed:
            continue
        *parents, last = path.split("/")
        section = top
        for parent in parents:
            section = section.setdefault(parent, {})
        place = leaf.sharding
        if path in found.changed:
            place = NamedSharding(place.mesh, PartitionSpec())
        section[last] = jax.ShapeDtypeStruct(have[path].shape, have[path].dtype, sharding=place)
    return result
