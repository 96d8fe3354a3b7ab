"""Scores with all that decides them: a line of eval.jsonl each, and a Markdown table of them."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from diffusion_jax.evaluation.metrics import ENOUGH, Score
from diffusion_jax.visual.pixels import replace_file

JSONL = "eval.jsonl"
TABLE = "eval.md"
COLUMNS = (
    "score",
    "value",
    "standard_error",
    "n",
    "step",
    "solver",
    "steps",
    "evaluations",
    "guidance",
    "sampling",
    "conditions",
    "ema",
    "features",
    "weights_hash",
    "reference",
    "reference_hash",
    "resize",
    "rounding",
    "seed",
    "seconds",
    "remark",
)
"""Of the table; a line of the file may hold more."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Circumstances:
    """What a score depends on besides the samples' number; every field is a column.

    Attributes:
        step: of the checkpoint.
        ema: name or length of the average; "" for the raw weights.
        seed: of the samples.
        seconds: of the whole evaluation.
        solver, steps, guidance: of the sampling; "" and 0 where nothing was sampled.
        evaluations: of networks for a sample.
        sampling: what else of it is not as it is by itself, in words.
        features, weights_hash, resize: of the feature network.
        rounding: from samples to pixels.
        reference, reference_hash: what was compared with.
        reference_count: its examples; None where published statistics do not tell.
        more: other options that were given.
    """

    step: int
    ema: str
    seed: int
    seconds: float
    solver: str = ""
    steps: int = 0
    guidance: float = 1.0
    evaluations: int = 0
    sampling: str = ""
    features: str = ""
    weights_hash: str = ""
    resize: str = ""
    rounding: str = ""
    reference: str = ""
    reference_hash: str = ""
    reference_count: int | None = 0
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def rows(scores: Iterable[Score], under: Circumstances) -> list[dict[str, Any]]:
    """One flat row a score."""
    fixed = dataclasses.asdict(under)
    fixed |= fixed.pop("more")
    return [
        {
            "score": score.name,
            "metric": score.metric,
            "value": score.estimate.value,
            "standard_error": score.estimate.standard_error,
            "n": score.estimate.n,
            **fixed,
            "remark": score.remark,
        }
        for score in scores
    ]


def scalars(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Scores and their standard errors under names for curves.

    Those of few samples, which cannot be compared with those of many, have their number in them.
    """
    found = {}
    for row in rows:
        samples = row.get("samples", ENOUGH)
        few = f"_of_{samples}" if samples < ENOUGH else ""
        found[f"eval/{row['score']}{few}"] = row["value"]
        found[f"eval/{row['score']}{few}_standard_error"] = row["standard_error"]
    return found


def append(folder: Path, new: list[dict[str, Any]]) -> None:
    """Adds rows to eval.jsonl and writes the table of all anew.

    Values that JSON has no number for are written as texts, such as "inf".
    """
    path = folder / JSONL
    before = path.read_text() if path.exists() else ""
    # A line that was cut off by a fault is ended, not glued to the next.
    glue = "" if not before or before.endswith("\n") else "\n"
    lines = "".join(json.dumps(_plain(row), sort_keys=False) + "\n" for row in new)
    with path.open("a") as file:
        file.write(glue + lines)
        file.flush()
        os.fsync(file.fileno())
    replace_file(folder / TABLE, lambda part: _write(part, table(read(folder))))


def _write(path: Path, text: str) -> None:
    path.write_text(text)


def cut(folder: Path, past: Callable[[Mapping[str, Any]], bool]) -> None:
    """Takes rows out of eval.jsonl and its table, where there are any to take."""
    before = read(folder)
    kept = [row for row in before if not past(row)]
    if len(kept) == len(before):
        return

    def write(path: Path) -> None:
        path.write_text("".join(json.dumps(row) + "\n" for row in kept))

    replace_file(folder / JSONL, write)
    (folder / TABLE).write_text(table(kept))


def read(folder: Path) -> list[dict[str, Any]]:
    """The rows of eval.jsonl; a line that a fault cut off is passed over."""
    path, known = folder / JSONL, []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            known.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return known


def table(known: Iterable[Mapping[str, Any]]) -> str:
    """A Markdown table of rows."""
    head = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n"
    return head + "".join(
        f"| {' | '.join(_cell(row.get(name, '')) for name in COLUMNS)} |\n" for row in known
    )


def line(row: Mapping[str, Any]) -> str:
    """What a terminal shows of a score."""
    value, error = row["value"], row["standard_error"]
    remark = f"; {row['remark']}" if row["remark"] else ""
    against = f" against {row['reference']}" if row["reference"] else ""
    return f"{value:.4g} +- {error:.2g} {row['score']} (n={row['n']}{against}{remark})"


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: repr(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }


def _cell(value: Any) -> str:
    text = f"{value:.5g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
