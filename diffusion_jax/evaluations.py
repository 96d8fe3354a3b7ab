"""How good a trained run is: `diffusion_jax.evaluate("runs/digits", ["fd", "kid"], num=5000)`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffusion_jax import builders, workdir
from diffusion_jax.checkpoints import Checkpointer
from diffusion_jax.errors import ConfigError, unknown_name
from diffusion_jax.evaluation import metrics as image_metrics
from diffusion_jax.evaluation import report
from diffusion_jax.evaluation.metrics import Score
from diffusion_jax.evaluation.options import LikelihoodOptions
from diffusion_jax.judged import SPLITS, Judged
from diffusion_jax.likelihoods import bits_per_dim
from diffusion_jax.loading import load
from diffusion_jax.pipelines.options import whole
from diffusion_jax.pipelines.pixel import PixelPipeline

KNOWN = ("fid", *image_metrics.METRICS, "nearest", "bpd")


def evaluate(
    path: str | Path,
    metrics: Sequence[str] | None = None,
    *,
    num: int = 10_000,
    features: str = "self",
    reference: str = "train",
    split: str = "validation",
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
        metrics: fid, fd, sfid, fd_infinity, kid, cmmd, inception_score, precision_recall,
            density_coverage, class_accuracy, clip_score (of prompts), nearest (copies of training
            examples), bpd; None takes fd, kid, precision_recall of pictures, bpd of other data.
        num: samples; for bpd examples.
        features: self, or NAME:FILE with the file of its weights; see `feature_network`.
        reference: train or validation, or an .npz of statistics.
        split: data of bpd: validation or train.
        loading: arguments of `load`: ema, ema_length, weak, ...
        seed: of the samples and all else that is drawn.
        bpd: options of `bits_per_dim`.
        note: takes lines about what is going on.
        **options: of `PixelPipeline.sample`: labels, solver, steps, guidance, batch_size, ...

    Returns:
        A row a score: score, value, standard_error, n and all that decides them.

    Raises:
        ConfigError: an unknown metric, too few samples, data without pictures, or weights that do
            not fit.
        DataError: the data cannot be read.
    """
    names = checked(_usual(path) if metrics is None else metrics, features, reference, split)
    _check_bits(bpd or {})
    loading = dict(loading or {})
    num = whole("num", num, low=1)
    config = workdir.read_config(path)
    folder = workdir.folder_of(path)
    pipeline = load(path, note=note, **loading)
    under = circumstances(path, loading, seed)
    rows: list[dict[str, Any]] = []
    pictures = [name for name in names if name != "bpd"]
    if pictures:
        judged = Judged.build(config, pipeline, pictures, features, reference, note)
        rows += judged.rows(pipeline, num, folder, under, options, note)
    if "bpd" in names:
        rows += _bits(config, pipeline, split, num, under, bpd or {})
    if jax.process_index() == 0:
        report.append(folder, rows)
    return rows


def _usual(path: str | Path) -> tuple[str, ...]:
    """The metrics where none are asked for."""
    pictures = workdir.read_spec(path).kind == "image"
    return ("fd", "kid", "precision_recall") if pictures else ("bpd",)


def _bits(
    config: Any,
    pipeline: PixelPipeline,
    split: str,
    num: int,
    under: report.Circumstances,
    options: Mapping[str, Any],
) -> list[dict[str, Any]]:
    began = time.perf_counter()
    source = builders.source(config, split)
    found = bits_per_dim(pipeline, source, num=num, seed=under.seed, **options)
    of = f"one of {found.levels} values" if found.levels else "density"
    scores = [
        Score(name="bits/dim", estimate=found.bits_per_dim, remark=f"{found.method}; {of}"),
        Score(name="bits/example", estimate=found.bits),
    ]
    for name, term in found.terms.items():
        scores.append(Score(name=f"{name}-bits/dim", estimate=term))
    seconds, held = time.perf_counter() - began, f"{config.data.name} {split}"
    return report.rows(scores, dataclasses.replace(under, seconds=seconds, reference=held))


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
    if reference not in SPLITS and not reference.endswith(".npz"):
        raise ConfigError(unknown_name("reference", reference, [*SPLITS, "FILE.npz"]))
    return list(dict.fromkeys("fd" if name == "fid" else name for name in names))


def _check_bits(options: Mapping[str, Any]) -> None:
    known = {field.name for field in dataclasses.fields(LikelihoodOptions)} - {"seed"}
    for name in options:
        if name not in known:
            raise ConfigError(unknown_name("bpd_options", name, known))


def circumstances(path: str | Path, loading: Mapping[str, Any], seed: int) -> report.Circumstances:
    folder = workdir.folder_of(path) / workdir.CHECKPOINTS
    with Checkpointer(folder, read_only=True) as checkpoints:
        step = checkpoints.latest_step()
    ema, length = loading.get("ema"), loading.get("ema_length")
    stored = workdir.read_config(path).sampling.ema if ema is None else ema
    average = stored if length is None else f"length {length:g}"
    return report.Circumstances(step=step or 0, ema=average, seed=seed, seconds=0.0)


def curve(path: str | Path, score: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, values and standard errors of a score in the eval.jsonl of a workdir."""
    found = [row for row in report.read(workdir.folder_of(path)) if row["score"] == score]
    columns = ("step", "value", "standard_error")
    steps, values, errors = (np.asarray([float(r[c]) for r in found]) for c in columns)
    return steps, values, errors
