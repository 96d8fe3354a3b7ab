"""The page docs/results.md of evaluated runs: tables of scores, curves over training, Pareto plots.

    python benchmarks/results_page.py digits=runs/digits mnist=runs/mnist ...

Reads eval.jsonl of each workdir: the evaluation of most samples gives the table, scores at three
checkpoints or more give the curve, and at several solvers and steps the plot of score against
evaluations of the network. Writes docs/images/results_NAME.png and what stands between the markers
of the page.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_jax.evaluation import report
from diffusion_jax.visual.curves import Curve, Panel, curve_plot
from diffusion_jax.visual.pixels import save_png

ROOT = Path(__file__).resolve().parents[1]
PAGE, PICTURES = ROOT / "docs/results.md", ROOT / "docs/images"
BEGIN, END = "<!-- results_page.py: begin -->", "<!-- results_page.py: end -->"
SCORE = "FD-self"
LEFT_OUT = ("prior-", "diffusion-", "reconstruction-", "loss at", "bits/example")
"""Beginnings of the scores that the tables leave to eval.jsonl."""


def main() -> None:
    parts = []
    for argument in sys.argv[1:]:
        name, _, folder = argument.partition("=")
        rows = report.read(Path(folder))
        _picture(rows, PICTURES / f"results_{name}.png")
        parts.append(_section(name, rows))
    text = PAGE.read_text()
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    PAGE.write_text(before + BEGIN + "\n\n" + "\n\n".join(parts) + "\n\n" + after)


def _section(name: str, rows: list[dict[str, Any]]) -> str:
    most = max(row["samples"] for row in rows if "samples" in row)
    whole = [row for row in rows if row.get("samples") == most or row["metric"] in ("bpd", "loss")]
    lines = ["| score | value | standard error | n | |", "|---|---|---|---|---|"]
    shown = {row["score"]: row for row in whole if not row["score"].startswith(LEFT_OUT)}
    for score, row in shown.items():
        value, error = float(row["value"]), float(row["standard_error"])
        lines.append(f"| {score} | {value:.4g} | {error:.2g} | {row['n']} | {row['remark']} |")
    first = next(row for row in whole if row["score"] == SCORE)
    how = (
        f"Step {first['step']}, {first['solver']} of {first['steps']} steps at guidance "
        f"{first['guidance']:g}, seed {first['seed']}; reference {first['reference']} "
        f"({first['reference_count']} pictures, hash {first['reference_hash']}), feature network "
        f"{first['features']}, weights {first['weights_hash']}; {first['seconds']:.0f} s for the "
        f"scores of samples, of which {first['sampling_and_features_share']:.0%} sampling and "
        "features."
    )
    picture = f"![{name}: score over training and over evaluations](images/results_{name}.png)"
    return "\n\n".join([f"## {name}", how, "\n".join(lines), picture])


def _picture(rows: list[dict[str, Any]], path: Path) -> None:
    rows = [row for row in rows if row["score"] == SCORE]
    panels = [
        Panel(title=f"{SCORE} over training", x_label="step", curves=_over_training(rows)),
        Panel(
            title=f"{SCORE} against cost",
            x_label="evaluations of the network a sample",
            curves=_against_cost(rows),
            log=True,
            x_log=True,
        ),
    ]
    save_png(path, curve_plot([panel for panel in panels if panel.curves], size=(460, 340)))


def _over_training(rows: list[dict[str, Any]]) -> list[Curve]:
    """Of the same samples' number and sampler at the most steps."""
    groups: dict[Any, dict[float, dict[str, Any]]] = {}
    for row in rows:
        key = row["samples"], row["solver"], row["steps"], row["guidance"]
        groups.setdefault(key, {})[row["step"]] = row
    (number, *_), points = max(groups.items(), key=lambda item: len(item[1]))
    return [_curve(points, f"{number} samples")] if len(points) >= 3 else []


def _against_cost(rows: list[dict[str, Any]]) -> list[Curve]:
    """Of the newest checkpoint and the number of samples with most combinations."""
    newest = max(row["step"] for row in rows)
    rows = [row for row in rows if row["step"] == newest]
    numbers = [row["samples"] for row in rows]
    number = max(set(numbers), key=numbers.count)
    guided = len({row["guidance"] for row in rows if row["samples"] == number}) > 1
    lines: dict[str, dict[float, dict[str, Any]]] = {}
    for row in rows:
        if row["samples"] == number:
            label = row["solver"] + (f", guidance {row['guidance']:g}" if guided else "")
            lines.setdefault(label, {})[row["evaluations"]] = row
    return [_curve(points, label) for label, points in lines.items()]


def _curve(points: dict[float, dict[str, Any]], label: str) -> Curve:
    """Scores and their error bars by step or cost."""
    x = sorted(points)
    y, errors = (
        np.asarray([float(points[one][name]) for one in x]) for name in ("value", "standard_error")
    )
    return Curve(x=np.asarray(x, float), y=y, errors=errors, label=label)


if __name__ == "__main__":
    main()
