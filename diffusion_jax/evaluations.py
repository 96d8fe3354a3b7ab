"""How good a trained run is: `diffusion_jax.evaluate("runs/digits", ["fd", "kid"], num=5000)`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffusion_jax import builders, data, start, workdir
from diffusion_jax.checkpoints import Checkpointer
from diffusion_jax.errors import ConfigError, unknown_name
from diffusion_jax.evaluation import metrics as image_metrics
from diffusion_jax.evaluation import references, report
from diffusion_jax.evaluation.collected import Collected
from diffusion_jax.evaluation.features.extract import Extractor
from diffusion_jax.evaluation.metrics import Reference, Score
from diffusion_jax.evaluation.nearest import Neighbours
from diffusion_jax.evaluation.options import LikelihoodOptions
from diffusion_jax.feature_networks import feature_network
from diffusion_jax.likelihoods import bits_per_dim
from diffusion_jax.loading import load
from diffusion_jax.pipelines.counting import network_evaluations
from diffusion_jax.pipelines.options import SamplingOptions, whole
from diffusion_jax.pipelines.pixel import PixelPipeline

FOLDER = "evaluation"
ROUNDING = "round((x + 1) * 127.5) to uint8"
KNOWN = ("fid", *image_metrics.METRICS, "nearest", "bpd")
SPLITS = ("train", "validation")


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
            density_coverage, class_accuracy, nearest (copies of training examples), bpd; None
            takes fd, kid and precision_recall of pictures, bpd of other data.
        num: samples; for bpd examples.
        features: the feature network: self, or NAME:FILE with the file of its weights.
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
    if metrics is None:
        pictures = workdir.read_spec(path).kind == "image"
        metrics = ("fd", "kid", "precision_recall") if pictures else ("bpd",)
    names = checked(metrics, features, reference, split)
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


def _given(options: Mapping[str, Any]) -> str:
    """The options that are not left at their defaults, as text."""
    return ", ".join(f"{k}={v!r}" for k, v in options.items() if v is not None and v != [])


_OPTIONS = {field.name for field in dataclasses.fields(SamplingOptions)}


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged:
    """A feature network, a reference and the metrics that are asked for."""

    names: list[str]
    extractor: Extractor
    reference: Reference
    training: data.Source
    remark: str

    @classmethod
    def build(
        cls,
        config: Any,
        pipeline: PixelPipeline,
        names: list[str],
        features: str,
        reference: str,
        note: Callable[[str], None],
    ) -> Judged:
        if pipeline.spec.kind != "image":
            raise ConfigError(
                f"metrics={','.join(names)}: the data are {pipeline.spec.kind}, no pictures; "
                "expected bpd"
            )
        training = builders.source(config, "train")
        cache = start.default_cache().parent / FOLDER
        network, remark = feature_network(features, config, training, cache, note)
        extractor = Extractor(network, pipeline.mesh)
        if reference in SPLITS:
            source = training if reference == "train" else builders.source(config, reference)
            wanted = ("features", "spatial") if "sfid" in names else ("features",)
            title = f"{config.data.name} {reference}"
            note(f"reference: {len(source)} pictures of {title}")
            found = references.of_source(source, title, extractor, wanted, cache)
        else:
            found = references.of_file(reference)
        return cls(
            names=names, extractor=extractor, reference=found, training=training, remark=remark
        )

    def about(self) -> dict[str, Any]:
        """What the report says of network and reference."""
        network, reference = self.extractor.network, self.reference
        return {
            "features": network.name + (f" ({self.remark})" if self.remark else ""),
            "weights_hash": network.weights_hash,
            "resize": network.resize,
            "rounding": ROUNDING,
            "reference": reference.name,
            "reference_hash": reference.hash,
            "reference_count": reference.count,
        }

    def rows(
        self,
        pipeline: PixelPipeline,
        num: int,
        folder: Path,
        under: report.Circumstances,
        options: Mapping[str, Any],
        note: Callable[[str], None],
    ) -> list[dict[str, Any]]:
        """Samples, and a row for each of their scores."""
        began = time.perf_counter()
        wanted = ("features", "spatial") if "sfid" in self.names else ("features",)
        collected = Collected(num, wanted, under.seed)
        near = Neighbours(num) if "nearest" in self.names else None
        done = 0
        for samples in pipeline.stream(num, seed=under.seed, **options):
            collected.add(samples.x, self.extractor, samples.label, samples.finite)
            if near is not None:
                near.see(samples.x, samples.finite)
            done += len(samples)
            note(f"{done}/{num} samples")
        sampled = time.perf_counter() - began
        plain = [name for name in self.names if name != "nearest"]
        found = image_metrics.scores(plain, collected, self.reference, self.extractor.network)
        if near is not None:
            sheets = folder / FOLDER
            found.append(near.score(collected, self.training, self.extractor, sheets, under.step))
        seconds = time.perf_counter() - began
        given = {k: v for k, v in options.items() if k in _OPTIONS}
        chosen = pipeline.options(**given)
        how: dict[str, Any] = {
            "solver": chosen.solver,
            "steps": chosen.steps,
            "guidance": chosen.guidance,
            "evaluations": network_evaluations(pipeline, **given),
        }
        more = {"sampling_and_features_share": sampled / seconds, "options": _given(options)}
        own = self.about()
        return report.rows(
            found, dataclasses.replace(under, seconds=seconds, more=more, **how, **own)
        )


def curve(path: str | Path, score: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, values and standard errors of a score in the eval.jsonl of a workdir."""
    found = [row for row in report.read(workdir.folder_of(path)) if row["score"] == score]
    columns = ("step", "value", "standard_error")
    steps, values, errors = (np.asarray([float(r[c]) for r in found]) for c in columns)
    return steps, values, errors
