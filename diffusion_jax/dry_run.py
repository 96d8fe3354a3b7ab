"""A run put together, measured and shown, but not started.

What can be wrong with a config, its data, its mesh or its memory shows here: everything is built
as a run would build it and the training step is compiled, which also fills the cache of compiled
programs. No state is made, nothing is trained and no checkpoint is touched; the pictures go into
`dry_run/` of the workdir, which a first run passes over.
"""

from __future__ import annotations

import collections
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffusion_jax import builders, config_rules, data, plots, start, workdir
from diffusion_jax.api import Run
from diffusion_jax.config import Config
from diffusion_jax.data import DataSpec
from diffusion_jax.parallel.sharding import path_name
from diffusion_jax.pipelines.drawing import draw, labelled
from diffusion_jax.visual import save_png

PyTree = Any
MOST_EXAMPLES = 64
"""Examples in the picture of a batch at most; of large images fewer, by the next number."""
MOST_PIXELS = 2048
"""Side of that picture in pixels, about."""
MOST_PARTS = 40
"""Lines about parts of the network at most."""
MOST_NAMES, MOST_CAPTIONS = 12, 3


def dry_run(config: Config, path: str | Path) -> None:
    """Builds a run, prints what it is made of and needs, and draws its data and noise levels.

    Args:
        config: as for `diffusion_jax.train`.
        path: the workdir; one that holds a run is checked against the config and left as it is.

    Raises:
        ConfigError: what `train` would refuse before its first step.
        DataError: the data are missing or unreadable.
    """
    config_rules.validate(config)
    config = builders.resolve(config)
    folder = workdir.prepare(path, config)
    step = start.newest(folder)
    run = Run.put_together(start.as_begun(folder, config), folder)
    run.enable_cache()
    local = run.loader().batch(0)
    batch = run.abstract_batch(local)
    _say(_data_lines(run, local))
    _say(_parameter_lines(run))
    if step is not None:
        _say([f"workdir: {folder} would be resumed from step {step} of {config.steps}"])
    if run.begin is not None:
        _say(list(run.begin.report))
    flops = run.flops_per_step(batch)
    rows = f"{config.batch_size} examples, forwards and backwards, over all devices"
    _say([f"compute: {_scaled(flops)}FLOP a step ({rows})"])
    if run.is_main:
        with workdir.reported(folder):
            _say(_draw(run, local, folder / workdir.DRY_RUN))
    _say(_state_lines(run, batch))
    began = time.perf_counter()
    compiled = run.compiled.lower(batch, run.frozen.trees).compile()
    _say(_compiled_lines(compiled, run.compiled.mesh, time.perf_counter() - began))
    _say(["dry run: nothing was trained or saved; the same command without --dry_run trains"])


def _say(lines: Iterator[str] | list[str]) -> None:
    """From process 0; at once, since the next lines may take a while."""
    if jax.process_index() == 0:
        print(*lines, sep="\n", flush=True)


def _data_lines(run: Run, local: Mapping[str, Any]) -> Iterator[str]:
    spec = run.train_data.spec
    shape = " x ".join(map(str, spec.shape))
    yield (
        f"data: {run.config.data.name}, {len(run.train_data)} examples to train on, "
        f"{len(run.validation_data)} held out"
    )
    yield f"  {spec.kind} of shape {shape}, values from {spec.range[0]:g} to {spec.range[1]:g}"
    x = np.asarray(local["x"])
    yield (
        f"  first batch: {x.dtype}, from {x.min():.3g} to {x.max():.3g}, mean {x.mean():.3g}, "
        f"standard deviation {x.std():.3g}"
    )
    if spec.num_classes:
        names = f": {_some(spec.classes)}" if spec.classes else ""
        yield f"  {spec.num_classes} classes{names}"
    if spec.text_length:
        captions = data.decode_text(local["conditioning"]["text"][:MOST_CAPTIONS])
        yield f"  captions of {spec.text_length} bytes at most: {', '.join(map(repr, captions))}"
    if spec.scalars:
        yield f"  numbers: {', '.join(spec.scalars)}"
    yield f"  the network reads: {', '.join(run.model.conditions) or 'no conditioning'}"


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:MOST_NAMES]) + (", ..." if len(names) > MOST_NAMES else "")


def _parameter_lines(run: Run) -> Iterator[str]:
    params = run.compiled.abstract_state.params
    leaves = jax.tree_util.tree_leaves_with_path(params)
    total = sum(leaf.size for _, leaf in leaves)
    yield f"parameters: {total:,}, network {run.config.network.name!r}"
    parts: collections.Counter[str] = collections.Counter()
    for path, leaf in leaves:
        parts[path_name(path).split("/", 1)[0]] += leaf.size
    largest = sorted(parts, key=lambda name: -parts[name])[:MOST_PARTS]
    wide = max(map(len, largest), default=0)
    for name in (name for name in parts if name in largest):
        yield f"  {name:<{wide}}  {parts[name]:>15,}  {parts[name] / max(total, 1):6.1%}"
    if rest := len(parts) - len(largest):
        left = total - sum(parts[name] for name in largest)
        yield f"  {rest} smaller parts  {left:,}"
    mesh = run.compiled.mesh
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    yield f"sharding over {axes}:" if axes else "sharding: there is one device"
    groups: dict[str, list[Any]] = {}
    for _, leaf in leaves:
        groups.setdefault(_split(leaf.sharding), []).append(leaf)
    for name, members in groups.items():
        held = sum(math.prod(_shard(leaf)) for leaf in members)
        whole = sum(leaf.size for leaf in members)
        yield f"  {name}: {len(members)} arrays, {whole:,} parameters, {held:,} a device"
    here = sum(math.prod(_shard(leaf)) for _, leaf in leaves)
    yield f"  parameters a device: {here:,}"


def _split(sharding: Any) -> str:
    """Over which axes, in words; axes of one device split nothing."""
    sizes, used = sharding.mesh.shape, []
    for entry in sharding.spec:
        for axis in (entry,) if isinstance(entry, str) else entry or ():
            if sizes[axis] > 1:
                used.append(f"{axis} ({sizes[axis]})")
    return f"split over {' and '.join(used)}" if used else "whole on every device"


def _shard(leaf: Any) -> tuple[int, ...]:
    return leaf.sharding.shard_shape(leaf.shape)


def _bytes(tree: PyTree) -> int:
    """Bytes of a tree of shapes on one device."""
    # A random key is some integers; its own dtype tells no size.
    return sum(
        math.prod(_shard(leaf)) * getattr(leaf.dtype, "itemsize", 8)
        for leaf in jax.tree.leaves(tree)
    )


def _state_lines(run: Run, batch: PyTree) -> Iterator[str]:
    """What the training keeps on each device, from shapes and shardings alone."""
    state = run.compiled.abstract_state
    gradients = 4 * sum(math.prod(_shard(leaf)) for leaf in jax.tree.leaves(state.params))
    ahead = run.config.data.prefetch
    kept = {
        "parameters": _bytes(state.params),
        "optimizer": _bytes(state.opt_state),
        f"averages ({len(state.ema)})": _bytes(state.ema),
        "objective": _bytes(state.extra),
        "frozen": _bytes(run.frozen.trees),
        "gradients": gradients,
        f"batches (1 and {ahead} ahead)": (1 + ahead) * _bytes(batch),
    }
    yield "memory a device, without activations:"
    wide = max(map(len, kept))
    for name, size in kept.items():
        if size:
            yield f"  {name:<{wide}}  {_memory(size):>10}"
    yield f"  {'sum':<{wide}}  {_memory(sum(kept.values())):>10}"


def _compiled_lines(compiled: Any, mesh: Any, seconds: float) -> Iterator[str]:
    """What the compiled step needs at once: what goes in and comes out, and its scratch."""
    yield f"train step compiled in {seconds:.1f} s"
    stats = compiled.memory_analysis()
    if stats is None:
        yield "  this backend says nothing of its memory"
        return
    held = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    whole = held + stats.temp_size_in_bytes
    yield (
        f"  memory a device: state and batch {_memory(held)} + activations, gradients and scratch "
        f"{_memory(stats.temp_size_in_bytes)} = {_memory(whole)}"
    )
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    kind = mesh.devices.flat[0].device_kind
    if limit:
        verdict = "it fits" if whole <= limit else "IT DOES NOT FIT"
        yield f"  {kind} gives {_memory(limit)}: {verdict}"


def _draw(run: Run, local: Mapping[str, Any], folder: Path) -> Iterator[str]:
    """Writes the pictures; a line for each."""
    pictures = {
        "batch": _batch_picture(local, run.train_data.spec),
        "schedule": plots.schedule_plot(run.model.process, run.model.schedule),
        "time_sampling": plots.time_plot(
            run.compiled.trainer.objective.function, run.model.schedule
        ),
    }
    yield "pictures:"
    for name, drawn in pictures.items():
        target = folder / f"{name}.png"
        if drawn is None:
            # One of an earlier config would pass for this one's.
            target.unlink(missing_ok=True)
            yield f"  {name}: none for the process {run.config.process.name!r} and this objective"
        else:
            yield f"  {save_png(target, drawn)}"


def _batch_picture(local: Mapping[str, Any], spec: DataSpec) -> np.ndarray:
    """The first examples of the batch in this process, with labels or captions where they fit."""
    x = np.asarray(local["x"])
    if not labelled(spec):
        return draw(x[: 8 * MOST_EXAMPLES], spec)
    side = max(1, MOST_PIXELS // max(spec.shape[:2]))
    count = min(len(x), MOST_EXAMPLES, side * side)
    given, labels = local.get("conditioning", {}), None
    if "text" in given:
        labels = data.decode_text(given["text"][:count])
    elif "label" in given:
        names = spec.classes or tuple(map(str, range(spec.num_classes)))
        labels = [names[label] for label in given["label"][:count]]
    return draw(x[:count], spec, labels)


def _memory(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024.0:
            return f"{size:.4g} {unit}"
        size /= 1024.0
    return f"{size:.4g} GiB"


def _scaled(number: float) -> str:
    """`1.23 G` and the like, for a unit to follow."""
    for prefix in ("", "k", "M", "G", "T"):
        if number < 1000.0:
            return f"{number:.3g} {prefix}"
        number /= 1000.0
    return f"{number:.4g} P"
