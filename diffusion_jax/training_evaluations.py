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
from diffusion_jax.evaluation.metrics import Estimate, Score, check_count, higher_is_better
from diffusion_jax.evaluations import Evaluation
from diffusion_jax.parallel.distributed import gather_json
from diffusion_jax.pipelines.pixel import PixelPipeline
from diffusion_jax.reference_data import Sources
from diffusion_jax.training.loop import Evaluated, Interrupted

PyTree = Any
OURS = "during_training"
"""Column of eval.jsonl that tells these rows from those of `evaluate`."""
ASKED = "asked"
"""Column of the samples or examples that were asked for; fewer may have been there."""
ALIKE = (
    *("score", "features", "weights_hash", "resize", "reference", "reference_hash", "rounding"),
    *("solver", "steps", "guidance", "sampling", "conditions", "ema", "seed", ASKED),
)
"""Columns of scores that can be compared."""


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
        note: takes lines about what is going on.
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
    note: Callable[[str], None] = lambda text: None
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
            rows = [row for row in report.read(self.folder) if _ours(row) and row["step"] in kept]
        rows = gather_json(rows)[0]
        for one in dict.fromkeys(row["step"] for row in rows):
            self._compare([row for row in rows if row["step"] == one])
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
        """
        assert self._evaluation is not None, "start comes first"

        def watch(done: int) -> None:
            if stop():
                raise Interrupted

        under = report.Circumstances(
            step=step,
            ema=self.ema,
            seed=self.seed,
            seconds=0.0,
            more={OURS: True, ASKED: self.num},
        )
        pipeline = self.pipeline(state)
        try:
            rows = self._evaluation.rows(pipeline, self.num, self.folder, under, {}, watch)
        except ConfigError as error:
            # Weeks of training do not end because samples of one step cannot be judged.
            rows = _failed(self._evaluation.names, under, str(error))
            self.note(f"Warning: step {step} has no scores: {error}")
        # Process 0 decides: others may differ by rounding.
        rows = gather_json(rows)[0]
        if self._writes:
            report.append(self.folder, rows)
        scalars = {k: v for k, v in report.scalars(rows).items() if not math.isnan(float(v))}
        return Evaluated(scalars=scalars, best=self._compare(rows))

    @property
    def _writes(self) -> bool:
        return jax.process_index() == 0

    def _compare(self, rows: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the rows of a step are the best so far; then its checkpoint is kept.

        Another network, reference or way of sampling than before begins anew.
        """
        row = next((row for row in rows if self.best and row.get("metric") == self.best), None)
        if row is None or not math.isfinite(float(row["value"])):
            return False
        known = self._best
        if known is not None and all(known.get(name) == row.get(name) for name in ALIKE):
            sign = -1.0 if higher_is_better(row["score"]) else 1.0
            if sign * float(row["value"]) >= sign * float(known["value"]):
                return False
        self._best = row
        self.keep(row["step"])
        if self._writes:
            best_checkpoint.write(self.folder, row)
        return True


def _failed(names: Sequence[str], under: report.Circumstances, why: str) -> list[dict[str, Any]]:
    """Rows that say so."""
    nothing = Estimate(math.nan, math.nan, 0)
    return report.rows(
        [Score(name=name, estimate=nothing, remark=why, metric=name) for name in names], under
    )


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
            for name in ("best", "every"):
                if given[name]:
                    raise ConfigError(
                        f"{name}={given[name]!r}: metrics='' makes no scores; name some there"
                    )
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
        parts = config, sampler, names, given.features, given.reference, given.num, sources, note
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
        note=note,
    )
