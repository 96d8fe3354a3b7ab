"""Which solver, steps, guidance and average are best: `evaluate --sweep="solver=ddim|heun,..."`.

Every combination is scored; a table, a plot of score against evaluations of the network, and the
best of each cost come out.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffusion_jax import builders, evaluations, workdir
from diffusion_jax.errors import ConfigError, unknown_name
from diffusion_jax.evaluation import report
from diffusion_jax.evaluation.metrics import higher_is_better
from diffusion_jax.judged import FOLDER, Judged
from diffusion_jax.loading import load
from diffusion_jax.pipelines.options import whole
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
    reference: str = "train",
    seed: int = 0,
    note: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Scores of every combination, the same samples' numbers in each.

    Args:
        path: the workdir; eval.jsonl and eval.md there take all rows, `evaluation/sweep.md` and
            `evaluation/sweep.png` are those of this sweep.
        axes: by name (solver, steps, guidance, guidance_by, ema, ema_length) the values.
        metrics: as `evaluate`; the first score of them is the one that is plotted.
        num, features, reference, seed, note: as `evaluate`.
        **options: what all share, of `PixelPipeline.sample`.

    Returns:
        The rows, those on the Pareto front with the remark "best at its cost".

    Raises:
        ConfigError: an unknown axis, one without values, or what `evaluate` refuses.
    """
    for name, values in axes.items():
        if name not in AXES:
            raise ConfigError(unknown_name("sweep", name, AXES))
        if not values:
            raise ConfigError(f"sweep: {name} has no values; expected some, such as {name}=1|2")
    names = evaluations.checked(metrics, features, reference, "validation")
    for name in evaluations.OF_DATA:
        if name in names:
            raise ConfigError(f"metrics={name}: the sampler has no part in it; leave it in a sweep")
    num, config, folder = whole("num", num, low=1), workdir.read_config(path), Path(path)
    rows: list[dict[str, Any]] = []
    judged = None

    def watch(done: int) -> None:
        note(f"{done}/{num} samples")

    outer = [name for name in axes if name in LOADING]
    inner = [name for name in axes if name not in LOADING]
    for loaded in itertools.product(*(axes[name] for name in outer)):
        loading = dict(zip(outer, loaded, strict=True))
        pipeline = load(path, note=note, **loading)
        under = evaluations.circumstances(path, loading, seed)
        if judged is None:
            sources = functools.partial(builders.source, config)
            parts = config, pipeline, names, features, reference, sources, note
            judged = Judged.build(*parts)
        for values in itertools.product(*(axes[name] for name in inner)):
            chosen = {**options, **dict(zip(inner, values, strict=True))}
            note(", ".join(f"{k}={v}" for k, v in {**loading, **chosen}.items() if v is not None))
            rows += judged.rows(pipeline, num, folder, under, chosen, watch)
    first = rows[0]["score"]
    _mark(rows, first)
    if jax.process_index() == 0:
        report.append(folder, rows)
        _write(folder / FOLDER, rows, first)
    return rows


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
        [row["evaluations"] for row in chosen],
        [row["value"] for row in chosen],
        high=higher_is_better(score),
    )
    for row, best in zip(chosen, found, strict=True):
        if best:
            row["remark"] = "; ".join(filter(None, (row["remark"], "best at its cost")))


def best(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The row of the best first score."""
    score = rows[0]["score"]
    chosen = [row for row in rows if row["score"] == score]
    sign = -1.0 if higher_is_better(score) else 1.0
    return min(chosen, key=lambda row: sign * row["value"])


def _write(folder: Path, rows: list[dict[str, Any]], score: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)

    def write(path: Path) -> None:
        path.write_text(report.table(rows))

    replace_file(folder / "sweep.md", write)
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["score"] == score and np.isfinite(row["value"]):
            parts = [row["solver"], f"guidance {row['guidance']:g}", f"ema {row['ema'] or 'raw'}"]
            point = float(row["evaluations"]), float(row["value"])
            lines.setdefault(", ".join(parts), []).append(point)
    curves = []
    for label, points in lines.items():
        x, y = np.asarray(sorted(points)).T
        curves.append(Curve(x=x, y=y, label=label))
    if curves:
        title = f"{score} against evaluations of the network"
        panel = Panel(title=title, x_label="evaluations a sample", curves=curves, log=True)
        save_png(folder / "sweep.png", curve_plot([panel], size=(560, 360)))
