"""How good a trained run is: `api.evaluate("runs/digits", ["fd", "kid"], num=5000)`."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffusion_jax import builders, feature_networks, workdir
from diffusion_jax.best_checkpoint import asked_step
from diffusion_jax.checkpoints import Checkpointer
from diffusion_jax.data import DataSpec
from diffusion_jax.errors import ConfigError, unknown_name
from diffusion_jax.evaluation import metrics as image_metrics
from diffusion_jax.evaluation import report
from diffusion_jax.evaluation.metrics import Score
from diffusion_jax.evaluation.options import LikelihoodOptions
from diffusion_jax.judged import FOLDER, Judged, check_call, given_text
from diffusion_jax.likelihoods import bits_per_dim
from diffusion_jax.loading import load
from diffusion_jax.losses import loss_rows
from diffusion_jax.parallel.distributed import gather_json
from diffusion_jax.pipelines.options import whole
from diffusion_jax.pipelines.pixel import PixelPipeline
from diffusion_jax.reference_data import SPLITS, Sources, check_name
from diffusion_jax.training.writers import TensorBoardWriter

OF_DATA = ("bpd", "loss")
"""Metrics of data, which need no samples."""
HELD_OUT = "validation"
KNOWN = ("fid", *image_metrics.METRICS, "nearest", *OF_DATA)


def evaluate(
    path: str | Path,
    metrics: Sequence[str] | None = None,
    *,
    num: int = 10_000,
    features: str = "self",
    reference: str | Path = "train",
    split: str | None = None,
    loading: Mapping[str, Any] | None = None,
    seed: int = 0,
    bpd: Mapping[str, Any] | None = None,
    note: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Scores of a trained workdir, also appended to its eval.jsonl and eval.md.

    Samples are drawn once for all metrics, batch by batch: memory does not grow with `num`.

    Args:
        path: the workdir.
        metrics: of `KNOWN`; nearest finds copies of training examples, clip_score judges prompts,
            loss goes by noise level. None takes fd, kid and precision_recall of pictures, bpd of
            other data.
        num: samples; for bpd and loss examples.
        features: self, or NAME:FILE with the file of its weights (inception:FILE:tf1,
            clip:FILE:TOKENIZER); see `feature_network`.
        reference: train or validation, a folder of pictures, or an .npz of statistics.
        split: data of bpd and loss: validation (where it is None) or train.
        loading: arguments of `load`: ema, ema_length, checkpoint, weak, ...
        seed: of the samples and all else that is drawn.
        bpd: options of `bits_per_dim`.
        note: takes lines about what is going on.
        **options: of `PixelPipeline.sample`: labels, solver, steps, guidance, batch_size, ...

    Returns:
        A row a score: score, value, standard_error, n and all that decides them.

    Raises:
        ConfigError: an unknown metric, too few samples, no pictures, or weights that do not fit.
        DataError: the data cannot be read.
    """
    features, reference, split = str(features), str(reference), split or ""
    names = checked(metrics or _usual(path, metrics), features, reference, split or HELD_OUT)
    _check_read(names, {**options, "bpd_options": bpd, "split": split})
    num, seed = whole("num", num, low=1), whole("seed", seed, low=0, below=2**32)
    config, folder = workdir.read_config(path), workdir.folder_of(path)
    samples = not set(OF_DATA).issuperset(names)
    loading = pinned(path, {**({} if samples else {"weak": ""}), **(loading or {})})
    pipeline = load(path, note=note, **loading)
    under = circumstances(path, loading, seed)
    sources = functools.cache(functools.partial(builders.source, config))
    if samples:
        check_call(pipeline, sources("train"), seed, options)
    parts = config, pipeline, names, features, reference, num, sources, note
    evaluation = Evaluation.build(*parts, split=split or HELD_OUT, bpd=bpd)
    told = functools.partial(_tell, note, num)
    rows = evaluation.rows(pipeline, num, folder, under, options, told)
    _write(config, folder, rows)
    return rows


def _tell(note: Callable[[str], None], num: int, done: int) -> None:
    note(f"{done}/{num} done")


def _usual(path: str | Path, asked: Sequence[str] | None) -> Sequence[str]:
    """The metrics where None are asked for."""
    if asked is not None:
        return asked
    pictures = workdir.read_spec(path).kind == "image"
    return ("fd", "kid", "precision_recall") if pictures else ("bpd",)


def _write(config: Any, folder: Path, rows: list[dict[str, Any]]) -> None:
    """TensorBoard's go to a folder of their own, which a training beside does not write to."""
    if jax.process_index() != 0:
        return
    report.append(folder, rows)
    if not config.logging.tensorboard:
        return
    writer = TensorBoardWriter(folder / FOLDER, start_step=0)
    writer.scalars(rows[0]["step"], report.scalars(rows))
    writer.close()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is to be scored, with all that the scores need but the samples.

    Attributes:
        names: of the metrics, checked.
        judged: network and reference of those over pictures, where any are asked for.
        config: of the run.
        sources: its data by split.
        split: data of bpd and loss.
        bpd: options of `bits_per_dim`.
    """

    names: list[str]
    judged: Judged | None
    config: Any
    sources: Sources
    split: str
    bpd: Mapping[str, Any]

    @classmethod
    def build(
        cls,
        config: Any,
        pipeline: PixelPipeline,
        names: list[str],
        features: str,
        reference: str,
        num: int,
        sources: Sources,
        note: Callable[[str], None],
        *,
        split: str = "validation",
        bpd: Mapping[str, Any] | None = None,
    ) -> Evaluation:
        """See `Judged.build` for the arguments and errors."""
        pictures = [name for name in names if name not in OF_DATA]
        judged = None
        check_kind(names, pipeline.spec)
        if pictures:
            parts = config, pipeline, pictures, features, reference, num, sources, note
            judged = Judged.build(*parts)
        return cls(
            names=names,
            judged=judged,
            config=config,
            sources=sources,
            split=split,
            bpd=bpd or {},
        )

    def rows(
        self,
        pipeline: PixelPipeline,
        num: int,
        folder: Path,
        under: report.Circumstances,
        options: Mapping[str, Any],
        watch: Callable[[int], None],
    ) -> list[dict[str, Any]]:
        """A row a score; `watch` is told how many samples or examples are done, and may raise."""
        rows: list[dict[str, Any]] = []
        if self.judged is not None:
            rows += self.judged.rows(pipeline, num, folder, under, options, watch)
        if "bpd" in self.names:
            rows += self._bits(pipeline, num, under, watch)
        if "loss" in self.names:
            source = self.sources(self.split)
            rows += loss_rows(self.config, source, pipeline, self.split, num, under, watch)
        return rows

    def _bits(
        self,
        pipeline: PixelPipeline,
        num: int,
        under: report.Circumstances,
        watch: Callable[[int], None],
    ) -> list[dict[str, Any]]:
        began = time.perf_counter()
        source = self.sources(self.split)
        found = bits_per_dim(pipeline, source, num=num, seed=under.seed, progress=watch, **self.bpd)
        of = f"one of {found.levels} values" if found.levels else "density"
        scores = [
            Score(name="bits/dim", estimate=found.bits_per_dim, remark=f"{found.method}; {of}"),
            Score(name="bits/example", estimate=found.bits),
        ]
        for name, term in found.terms.items():
            scores.append(Score(name=f"{name}-bits/dim", estimate=term))
        scores = [dataclasses.replace(score, metric="bpd") for score in scores]
        seconds, held = time.perf_counter() - began, f"{self.config.data.name} {self.split}"
        return report.rows(scores, dataclasses.replace(under, seconds=seconds, reference=held))


def check_kind(names: Sequence[str], spec: DataSpec) -> None:
    """Raises ConfigError where metrics are over pictures and the data are none."""
    pictures = [name for name in names if name not in OF_DATA]
    if pictures and spec.kind != "image":
        raise ConfigError(
            f"metrics={','.join(pictures)}: the data are {spec.kind}, no pictures; "
            "expected bpd or loss"
        )


def checked(metrics: Sequence[str], features: str, reference: str, split: str) -> list[str]:
    names = [metrics] if isinstance(metrics, str) else list(metrics)
    if not names:
        raise ConfigError(f"metrics=[]: expected some of {', '.join(KNOWN)}")
    for name in names:
        if name not in KNOWN:
            raise ConfigError(unknown_name("metrics", name, KNOWN))
    if "fid" in names and not features.startswith("inception"):
        raise ConfigError(
            f"metrics=fid: FID is that of the Inception network, not of features={features!r}; "
            "give features=inception:FILE, or ask for fd"
        )
    if split not in SPLITS:
        raise ConfigError(unknown_name("split", split, SPLITS))
    check_name(reference)
    feature_networks.check(features, names)
    return list(dict.fromkeys("fd" if name == "fid" else name for name in names))


def _check_read(names: Sequence[str], options: Mapping[str, Any]) -> None:
    """Raises ConfigError for options that none of the metrics reads."""
    _check_bits(options["bpd_options"] or {})
    samples = not set(OF_DATA).issuperset(names)
    for name, value in options.items():
        read = {
            "bpd_options": "bpd" in names,
            "split": not set(OF_DATA).isdisjoint(names),
            # Changes no number.
            "batch_size": True,
        }.get(name, samples)
        if not read and value not in (None, "", [], (), {}):
            raise ConfigError(f"{name}={value!r}: metrics={','.join(names)} do not read it")


def _check_bits(options: Mapping[str, Any]) -> None:
    known = {field.name for field in dataclasses.fields(LikelihoodOptions)} - {"seed"}
    for name in options:
        if name not in known:
            raise ConfigError(unknown_name("bpd_options", name, known))


def pinned(path: str | Path, loading: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `load` by which every process and every call reads the same step, although a
    training may write another meanwhile."""
    if loading.get("ema_length") is not None:
        return dict(loading)
    step = asked_step(path, loading.get("checkpoint"))
    step = _newest(path) if step is None else step
    step = gather_json(step)[0]
    return dict(loading) if step is None else {**loading, "checkpoint": step}


def _newest(path: str | Path) -> int | None:
    folder = workdir.folder_of(path) / workdir.CHECKPOINTS
    with Checkpointer(folder, read_only=True) as checkpoints:
        return checkpoints.latest_step()


def circumstances(path: str | Path, loading: Mapping[str, Any], seed: int) -> report.Circumstances:
    """What the rows of a workdir's weights have in common; `loading` is `pinned`."""
    step = loading.get("checkpoint")
    step = _newest(path) if step is None else step
    ema, length = loading.get("ema"), loading.get("ema_length")
    stored = workdir.read_config(path).sampling.ema if ema is None else ema
    average = stored if length is None else f"length {length:g}"
    weak = {k: v for k, v in loading.items() if k.startswith("weak") and v not in (None, "")}
    more = {"weak": given_text(weak)} if weak else {}
    return report.Circumstances(step=step or 0, ema=average, seed=seed, seconds=0.0, more=more)


def curve(path: str | Path, score: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, values and standard errors of a score in the eval.jsonl of a workdir."""
    found = [row for row in report.read(workdir.folder_of(path)) if row["score"] == score]
    columns = ("step", "value", "standard_error")
    steps, values, errors = (np.asarray([float(r[c]) for r in found]) for c in columns)
    return steps, values, errors
