"""Which solver, steps, guidance and average are best: `evaluate --sweep="solver=ddim|heun,..."`.

Every combination is scored; a table, a plot of score against evaluations of the network, and the
best of each cost come out.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffusion_jax import builders, data, evaluations, workdir
from diffusion_jax.errors import ConfigError, unknown_name
from diffusion_jax.evaluation import report
from diffusion_jax.evaluation.collected import TooFewFinite
from diffusion_jax.evaluation.metrics import higher_is_better
from diffusion_jax.judged import FOLDER, Judged, check_call, given_text
from diffusion_jax.loading import load
from diffusion_jax.pipelines.options import whole
from diffusion_jax.pipelines.pixel import PixelPipeline
from diffusion_jax.visual.curves import Curve, Panel, curve_plot
from diffusion_jax.visual.pixels import replace_file, save_png

AXES = ("solver", "steps", "guidance", "guidance_by", "ema", "ema_length", "checkpoint")
LOADING = ("ema", "ema_length", "checkpoint")


def sweep(
    path: str | Path,
    axes: Mapping[str, Sequence[Any]],
    metrics: Sequence[str] = ("fd",),
    *,
    num: int = 10_000,
    features: str = "self",
    reference: str | Path = "train",
    loading: Mapping[str, Any] | None = None,
    seed: int = 0,
    note: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Scores of every combination, the same samples' numbers in each.

    All combinations are judged before the first is sampled. One with too few samples that are
    numbers is left out, and named in the table.

    Args:
        path: the workdir; eval.jsonl and eval.md there take the rows as they come,
            `evaluation/sweep.md` and `evaluation/sweep.png` are those of this sweep.
        axes: by name, one of `AXES`, the values.
        metrics: as `evaluate`; the first score of them is the one that is plotted.
        num, features, reference, loading, seed, note: as `evaluate`.
        **options: what all share, of `PixelPipeline.sample`.

    Returns:
        The rows, those on the Pareto front with the remark "best at its cost".

    Raises:
        ConfigError: an unknown axis, one without values or given besides; what `evaluate` refuses;
            samples of no combination are numbers.
    """
    loading, features, reference = dict(loading or {}), str(features), str(reference)
    _check_axes(axes, {**options, **loading})
    names = evaluations.checked(metrics, features, reference, "validation")
    for name in evaluations.OF_DATA:
        if name in names:
            raise ConfigError(f"metrics={name}: the sampler has no part in it; leave it in a sweep")
    num, folder = whole("num", num, low=1), workdir.folder_of(path)
    seed = whole("seed", seed, low=0, below=2**32)
    loads = [{**loading, **one} for one in _combinations(axes, of_weights=True)]
    # A training may save another newest step meanwhile.
    newest = evaluations.pinned(path, {}).get("checkpoint")
    calls = [{**options, **one} for one in _combinations(axes, of_weights=False)]
    config = workdir.read_config(path)
    sources = functools.cache(functools.partial(builders.source, config))
    first = _judged_beforehand(path, loads, calls, sources("train"), seed)
    parts = config, first, names, features, reference, num, sources, note
    run = _Run(path, folder, Judged.build(*parts), first, num, seed, note, newest)
    for load_with in loads:
        run.score(load_with, axes, calls)
    rows = run.rows
    if not rows:
        raise ConfigError(f"sweep: no combination is left; {run.left_out[0]}")
    _mark(rows, rows[0]["score"])
    if jax.process_index() == 0:
        _write(folder / FOLDER, rows, run.points, run.left_out)
    return rows


@dataclasses.dataclass
class _Run:
    """What the combinations of a sweep share, and what came out of them so far."""

    path: str | Path
    folder: Path
    judged: Judged
    first: PixelPipeline
    num: int
    seed: int
    note: Callable[[str], None]
    newest: int | None
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    points: list[tuple[str, dict[str, Any]]] = dataclasses.field(default_factory=list)
    left_out: list[str] = dataclasses.field(default_factory=list)

    def score(
        self,
        load_with: Mapping[str, Any],
        axes: Mapping[str, Sequence[Any]],
        calls: Sequence[Mapping[str, Any]],
    ) -> None:
        """All calls of one set of weights; their rows are in the files at once."""
        which = dict(load_with)
        if which.get("ema_length") is None and which.get("checkpoint") in (None, "newest"):
            which["checkpoint"] = self.newest
        which = evaluations.pinned(self.path, which)
        # One set of compiled programs for all weights.
        pipeline = self.first.with_params(load(self.path, **which).params)
        under = evaluations.circumstances(self.path, which, self.seed)
        for call in calls:
            chosen = given_text({**load_with, **call})
            self.note(chosen)
            try:
                new = self.judged.rows(pipeline, self.num, self.folder, under, call, self._progress)
            except TooFewFinite as error:
                self.left_out.append(f"{chosen}: {error}")
                self.note(self.left_out[-1])
                continue
            if jax.process_index() == 0:
                report.append(self.folder, new)
            self.rows += new
            self.points.append((_label(axes, {**load_with, **call}), new[0]))

    def _progress(self, done: int) -> None:
        self.note(f"{done}/{self.num} samples")


def _check_axes(axes: Mapping[str, Sequence[Any]], given: Mapping[str, Any]) -> None:
    if not axes:
        raise ConfigError(f"sweep: nothing to sweep; expected some of {', '.join(AXES)}")
    for name, values in axes.items():
        if name not in AXES:
            raise ConfigError(unknown_name("sweep", name, AXES))
        if isinstance(values, str) or not len(values):
            raise ConfigError(f"sweep: {name} has no values; expected some, such as {name}=1|2")
        twice = [value for number, value in enumerate(values) if value in values[:number]]
        if twice:
            raise ConfigError(f"sweep: {name}={twice[0]!r} is there twice; leave one")
        if given.get(name) is not None:
            raise ConfigError(f"{name}={given[name]!r}: the sweep has {name}, too; leave one")
    if {"ema", "ema_length"} <= axes.keys():
        raise ConfigError("sweep: ema and ema_length both choose the average; leave one")


def _combinations(axes: Mapping[str, Sequence[Any]], *, of_weights: bool) -> list[dict[str, Any]]:
    names = [name for name in axes if (name in LOADING) == of_weights]
    values = itertools.product(*(axes[name] for name in names))
    return [dict(zip(names, one, strict=True)) for one in values]


def _judged_beforehand(
    path: str | Path,
    loads: Sequence[Mapping[str, Any]],
    calls: Sequence[Mapping[str, Any]],
    training: data.Source,
    seed: int,
) -> PixelPipeline:
    """The pipeline of the first weights, after every combination was found to work."""
    first = load(path, **loads[0])
    for call in calls:
        check_call(first, training, seed, call)
    for other in loads[1:]:
        load(path, **other)
    return first


def _label(axes: Mapping[str, Sequence[Any]], chosen: Mapping[str, Any]) -> str:
    """What tells one line of the plot from others; along a line the steps change."""
    parts = []
    for name, values in axes.items():
        if name != "steps" and len(values) > 1:
            value = chosen[name]
            named_so = name in ("solver", "guidance_by")
            shown = f"{value:g}" if isinstance(value, float) else str(value)
            parts.append(shown if named_so else f"{name} {shown or 'raw'}")
    return ", ".join(parts)


def front(costs: Sequence[float], values: Sequence[float], *, high: bool) -> list[bool]:
    """Whether each point is on the Pareto front: none costs no more and is better, nor costs less
    and is as good."""
    signed = [-value if high else value for value in values]
    pairs = list(zip(costs, signed, strict=True))
    return [
        np.isfinite(v).item()
        and not any((a <= c and b < v) or (a < c and b <= v) for a, b in pairs)
        for c, v in pairs
    ]


def _mark(rows: list[dict[str, Any]], score: str) -> None:
    chosen = [row for row in rows if row["score"] == score]
    found = front(
        [float(row["evaluations"]) for row in chosen],
        [row["value"] for row in chosen],
        high=higher_is_better(score),
    )
    for row, best in zip(chosen, found, strict=True):
        if best:
            row["remark"] = "; ".join(filter(None, (row["remark"], "best at its cost")))


def best(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The row of the best first score; the first where none is a number."""
    score = rows[0]["score"]
    chosen = [row for row in rows if row["score"] == score and np.isfinite(row["value"])]
    if not chosen:
        return rows[0]
    sign = -1.0 if higher_is_better(score) else 1.0
    return min(chosen, key=lambda row: sign * row["value"])


def line(row: Mapping[str, Any]) -> str:
    """What a terminal shows of a score and its combination."""
    chosen = f"with {row['evaluations']} evaluations, ema={row['ema']!r}"
    return f"{report.line(row)} {', '.join(filter(None, (chosen, row['options'])))}"


def _write(
    folder: Path,
    rows: list[dict[str, Any]],
    points: list[tuple[str, dict[str, Any]]],
    left_out: list[str],
) -> None:
    def write(path: Path) -> None:
        path.write_text(report.table(rows) + "".join(f"\nLeft out: {one}\n" for one in left_out))

    replace_file(folder / "sweep.md", write)
    picture = _plot(points)
    if picture is not None:
        save_png(folder / "sweep.png", picture)


def _plot(points: list[tuple[str, dict[str, Any]]]) -> np.ndarray | None:
    """The first score against its cost; None where none is a number."""
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for label, row in points:
        if np.isfinite(row["value"]):
            error = row["standard_error"] if np.isfinite(row["standard_error"]) else 0.0
            found = float(row["evaluations"]), float(row["value"]), float(error)
            lines.setdefault(label, []).append(found)
    if not lines:
        return None
    curves, score = [], points[0][1]["score"]
    for label, found in lines.items():
        x, y, errors = np.asarray(sorted(found)).T
        curves.append(Curve(x=x, y=y, errors=errors, label=label))
    costs, values, _ = np.concatenate([np.asarray(found) for found in lines.values()]).T
    panel = Panel(
        title=f"{score} against evaluations of the network",
        x_label="evaluations a sample",
        curves=curves,
        x_log=bool(costs.max() > 3.0 * costs.min()),
        log=bool(values.min() > 0.0 and values.max() > 5.0 * values.min()),
    )
    return curve_plot([panel], size=(560, 360))
