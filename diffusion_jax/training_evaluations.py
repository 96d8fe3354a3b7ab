"""Scores during training: what is due when, and which checkpoint is the best so far.

A machine that is wanted back does not wait: sampling stops after the batch under way, the state is
saved, and the scores are made up for when the run goes on.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from diffusion_jax import best_checkpoint, evaluations
from diffusion_jax.data import DataSpec
from diffusion_jax.errors import ConfigError, named, unknown_name
from diffusion_jax.evaluation import report
from diffusion_jax.evaluation.metrics import check_count, higher_is_better
from diffusion_jax.evaluations import Evaluation
from diffusion_jax.parallel.distributed import gather_json
from diffusion_jax.pipelines.pixel import PixelPipeline
from diffusion_jax.reference_data import Sources
from diffusion_jax.training.loop import Evaluated, Interrupted

PyTree = Any
OURS = "during_training"
"""Column of eval.jsonl that tells these rows from those of `evaluate`."""


@dataclasses.dataclass(kw_only=True)
class TrainingEvaluation:
    """Evaluates the state of a run. Every process calls it alike.

    Attributes:
        build: makes the evaluation, with its networks and references, at the start.
        pipeline: `state -> sampler` with the average that is judged.
        folder: the workdir.
        ema: name of that average.
        every: interval in steps; 0 means at the end only.
        num: samples.
        seed: of them.
        best: the metric by whose first score the best checkpoint is kept, or "".
        keep: called with the step of the best checkpoint.
    """

    build: Callable[[], Evaluation]
    pipeline: Callable[[Any], PixelPipeline]
    folder: Path
    ema: str
    every: int
    num: int
    seed: int
    best: str
    keep: Callable[[int], None]
    _evaluation: Evaluation | None = None
    _best: Mapping[str, Any] | None = None

    def start(self, step: int, kept: Sequence[int]) -> None:
        """Makes ready for a run that goes on from `step`: rows past it will be written again.

        Args:
            step: of the state at hand.
            kept: steps of the checkpoints.

        Raises:
            ConfigError: a network or a reference that cannot be had.
            DataError: the data cannot be read.
        """
        rows = None
        if self._writes:
            report.cut(self.folder, lambda row: _ours(row) and row["step"] > step)
            rows = [row for row in report.read(self.folder) if self._counts(row, kept)]
        for row in gather_json(rows)[0]:
            self._compare(row)
        self._evaluation = self.build()

    def due(self, step: int, last: int) -> bool:
        """Whether to evaluate after update number `step` of `last`."""
        return step == last or (self.every > 0 and step % self.every == 0)

    def owed(self, step: int, last: int) -> bool:
        """Whether the evaluation of `step` was due, but never came to its end."""
        if step == 0 or not self.due(step, last):
            return False
        rows = report.read(self.folder) if self._writes else []
        return not gather_json(any(_ours(row) and row["step"] == step for row in rows))[0]

    def run(self, state: Any, step: int, stop: Callable[[], bool]) -> Evaluated:
        """Scores of a state.

        Raises:
            Interrupted: `stop` said so; nothing is written.
            ConfigError: too few finite samples.
        """
        assert self._evaluation is not None, "start comes first"

        def watch(done: int) -> None:
            if stop():
                raise Interrupted

        under = report.Circumstances(
            step=step, ema=self.ema, seed=self.seed, seconds=0.0, more={OURS: True}
        )
        pipeline = self.pipeline(state)
        rows = self._evaluation.rows(pipeline, self.num, self.folder, under, {}, watch)
        # Process 0 decides: others may differ by rounding.
        rows = gather_json(rows)[0]
        if self._writes:
            report.append(self.folder, rows)
        better = [self._compare(row) for row in rows]
        return Evaluated(scalars=report.scalars(rows), best=any(better))

    @property
    def _writes(self) -> bool:
        return jax.process_index() == 0

    def _counts(self, row: Mapping[str, Any], kept: Sequence[int]) -> bool:
        return _ours(row) and row["step"] in kept and row["n"] == self.num

    def _compare(self, row: Mapping[str, Any]) -> bool:
        """Whether the row is the best so far; then its checkpoint is kept."""
        first = (self._best or row)["score"]
        if not self.best or row.get("metric") != self.best or row["score"] != first:
            return False
        sign = -1.0 if higher_is_better(first) else 1.0
        value = sign * float(row["value"])
        if not math.isfinite(value):
            return False
        if self._best is not None and value >= sign * float(self._best["value"]):
            return False
        self._best = row
        self.keep(row["step"])
        if self._writes:
            best_checkpoint.write(self.folder, row)
        return True


def _ours(row: Mapping[str, Any]) -> bool:
    return bool(row.get(OURS))


def names_of(config: Any) -> list[str]:
    """The metrics of `config.evaluation`, checked as far as needs nothing else.

    Raises:
        ConfigError: an unknown metric, too few samples for one, or `best` is none of them.
    """
    given = config.evaluation
    asked = [name.strip() for name in given.metrics.split(",") if name.strip()]
    with named("config.evaluation."):
        if not asked:
            if given.best:
                raise ConfigError(f"best={given.best!r}: metrics='' makes no scores; name it there")
            return []
        names = evaluations.checked(asked, given.features, given.reference, "validation")
        check_count(names, given.num)
        if given.best and given.best not in asked:
            raise ConfigError(unknown_name("best", given.best, asked))
    return names


def check(config: Any, spec: DataSpec) -> None:
    """Raises ConfigError where `config.evaluation` cannot work with data of `spec`."""
    names = names_of(config)
    with named("config.evaluation."):
        evaluations.check_kind(names, spec)


def create(
    config: Any,
    folder: Path,
    sources: Sources,
    sampler: PixelPipeline,
    pipeline: Callable[[Any], PixelPipeline],
    keep: Callable[[int], None],
) -> TrainingEvaluation | None:
    """The evaluation that a config asks for, or None.

    Args:
        config: of the run.
        folder: its workdir.
        sources: its data by split.
        sampler: what samples, parameters aside.
        pipeline: the sampler of a state.
        keep: keeps the checkpoint of a step from being cleared away.

    Raises:
        ConfigError: see `names_of`.
    """
    names, given = names_of(config), config.evaluation
    if not names:
        return None

    def note(text: str) -> None:
        if jax.process_index() == 0:
            print(text, flush=True)

    def build() -> Evaluation:
        parts = config, sampler, names, given.features, given.reference, sources, note
        with named("config.evaluation."):
            return Evaluation.build(*parts)

    return TrainingEvaluation(
        build=build,
        pipeline=pipeline,
        folder=folder,
        ema=config.sampling.ema,
        every=given.every,
        num=given.num,
        seed=given.seed,
        best="fd" if given.best == "fid" else given.best,
        keep=keep,
    )
