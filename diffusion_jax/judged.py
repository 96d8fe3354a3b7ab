"""Samples of a pipeline, judged by a feature network against a reference."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffusion_jax import data, start
from diffusion_jax.errors import ConfigError
from diffusion_jax.evaluation import caption_score, report
from diffusion_jax.evaluation import metrics as image_metrics
from diffusion_jax.evaluation.collected import Collected
from diffusion_jax.evaluation.features.extract import Extractor
from diffusion_jax.evaluation.features.protocol import FeatureNetwork
from diffusion_jax.evaluation.metrics import Reference
from diffusion_jax.evaluation.nearest import Neighbours
from diffusion_jax.examples import conditions_of
from diffusion_jax.feature_networks import caption_extractor, feature_network
from diffusion_jax.pipelines.counting import network_evaluations
from diffusion_jax.pipelines.options import SamplingOptions
from diffusion_jax.pipelines.pixel import PixelPipeline
from diffusion_jax.reference_data import Sources, reference_of

FOLDER = "evaluation"
ROUNDING = "round((x + 1) * 127.5) to uint8"
_OPTIONS = {field.name for field in dataclasses.fields(SamplingOptions)}
_GUIDED = ("guidance_by", "guidance_options", "guidance_interval", "guidance_rescale")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged:
    """A feature network, a reference and the metrics that are asked for."""

    names: list[str]
    extractor: Extractor
    reference: Reference
    training: data.Source
    remark: str
    captions: caption_score.CaptionExtractor | None = None

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
    ) -> Judged:
        """What judges `num` samples of a pipeline, which are not drawn yet; it is the same in every
        process.

        Args:
            config: of the run.
            pipeline: what is judged, or one of its kind.
            names: of the metrics.
            features: the feature network: self, or NAME:FILE.
            reference: train, validation, a folder or an .npz of statistics.
            num: samples to come.
            sources: the data of the run by split.
            note: takes lines about what is going on.

        Raises:
            ConfigError: a network or a reference that cannot be had, or what the metrics need and
                would not get.
            DataError: the data cannot be read.
        """
        scored = caption_score.METRIC in names
        captions = caption_extractor(features, pipeline.mesh) if scored else None
        training = sources("train")
        cache = start.default_cache().parent / FOLDER
        network, remark = feature_network(features, config, training, cache, note)
        extractor = Extractor(network, pipeline.mesh)
        asked = [name for name in names if name != "nearest"]
        given = _dimensions(network, pipeline)
        image_metrics.check(asked, network, given, num)
        if "class_accuracy" in names and "label" not in pipeline.conditions:
            raise ConfigError("class_accuracy: the samples are asked for no class")
        wanted = _wanted(names)
        found = reference_of(reference, config, sources, extractor, wanted, cache, note)
        image_metrics.check(asked, network, given, num, found)
        return cls(
            names=names,
            extractor=extractor,
            reference=found,
            training=training,
            remark=remark,
            captions=captions,
        )

    def about(self) -> dict[str, Any]:
        """What the report says of network and reference."""
        network, reference = self.extractor.network, self.reference
        more = "; ".join(filter(None, [network.options, self.remark]))
        return {
            "features": network.name + (f" ({more})" if more else ""),
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
        watch: Callable[[int], None],
    ) -> list[dict[str, Any]]:
        """Samples, and a row for each of their scores; `watch` is told how many are done after
        each batch, and may raise."""
        given = {k: v for k, v in options.items() if k in _OPTIONS}
        branches = _branches(options)
        chosen = pipeline.options(negative=branches["negative"], **given)
        how: dict[str, Any] = {
            "solver": chosen.solver,
            "steps": chosen.steps,
            "guidance": chosen.guidance,
            "evaluations": network_evaluations(pipeline, **branches, **given),
            "sampling": _sampling(chosen, options),
        }
        began = time.perf_counter()
        captions = self.captions and caption_score.CaptionStream(self.captions)
        collected = Collected(num, _wanted(self.names), under.seed, captions)
        near = Neighbours(num) if "nearest" in self.names else None
        done = 0
        drawn = drawn_conditions(pipeline, self.training, num, under.seed, options)
        asked = {**options, **drawn}
        if captions is not None:
            caption_score.check_prompts(asked.get("prompts"))
        for samples in pipeline.stream(num, seed=under.seed, **asked):
            collected.add(samples.x, self.extractor, samples.label, samples.finite, samples.text)
            if near is not None:
                near.see(samples.x, samples.finite)
            done += len(samples)
            watch(done)
        sampled = time.perf_counter() - began
        plain = [name for name in self.names if name != "nearest"]
        found = image_metrics.scores(plain, collected, self.reference, self.extractor.network)
        if near is not None:
            sheets = folder / FOLDER
            parts = collected, self.training, self.extractor, sheets, under.step
            found.append(near.score(*parts, watch=lambda: watch(done)))
            sampled += near.feature_seconds
        seconds = time.perf_counter() - began
        more = {
            **under.more,
            "samples": num,
            "sampling_and_features_share": sampled / seconds,
            "options": given_text(options),
            "conditions": "of training examples, drawn" if drawn else "",
        }
        own = self.about()
        return report.rows(
            found, dataclasses.replace(under, seconds=seconds, more=more, **how, **own)
        )


def check_call(
    pipeline: PixelPipeline, training: data.Source, seed: int, call: Mapping[str, Any]
) -> None:
    """Raises ConfigError for options of the sampling that cannot be."""
    drawn = drawn_conditions(pipeline, training, 1, seed, call)
    pipeline.stream(1, seed=seed, **{**call, **drawn})


def _branches(options: Mapping[str, Any]) -> dict[str, Any]:
    """Whether there is a negative condition, and how many further ones."""
    fields = ("labels", "prompts", "scalars")
    also = [options.get(f"also_{field}") for field in fields]
    return {
        "negative": any(not _none(options.get(f"negative_{field}")) for field in fields),
        "also": max(0 if one is None else len(one) for one in also),
    }


def _sampling(chosen: SamplingOptions, options: Mapping[str, Any]) -> str:
    """What is not as it is by itself, beside solver, steps and guidance; conditions too."""
    plain = SamplingOptions(solver=chosen.solver, steps=chosen.steps)
    fields = {name: getattr(chosen, name) for name in _OPTIONS}
    fields["solver_options"] = chosen.solver_options.get(chosen.solver, {})
    fields["guidance_options"] = chosen.guidance_options.get(chosen.guidance_by, {})
    shown = {k: v for k, v in fields.items() if v != getattr(plain, k)}
    for name in ("guidance", "batch_size", *(() if chosen.guided else _GUIDED)):
        shown.pop(name, None)
    conditions = {k: v for k, v in options.items() if k not in _OPTIONS}
    return given_text({**dict(sorted(shown.items())), **conditions})


def drawn_conditions(
    pipeline: PixelPipeline,
    training: data.Source,
    num: int,
    seed: int,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Labels, captions and numbers of training examples, where `options` give none: p(x) of the
    data is that of the model under the conditions that the data have."""
    if not all(_none(options.get(name)) for name in ("labels", "prompts", "scalars")):
        return {}
    count = len(training)
    random = np.random.default_rng(seed)
    rows = random.permutation(count) if num >= count else random.choice(count, num, False)
    return conditions_of(pipeline.conditions, training, rows.astype(np.int64))


def _dimensions(network: FeatureNetwork, pipeline: PixelPipeline) -> dict[str, int]:
    shape = jax.ShapeDtypeStruct((1, *pipeline.spec.shape[:2], 3), np.uint8)
    shapes = jax.eval_shape(network.apply, network.params, shape)
    return {name: feature.shape[-1] for name, feature in shapes.items()}


def _none(value: Any) -> bool:
    # Of one number `stream` says what it expects.
    return value is None or (hasattr(value, "__len__") and len(value) == 0)


def _wanted(names: list[str]) -> tuple[str, ...]:
    """Features whose moments the metrics need."""
    return ("features", "spatial") if "sfid" in names else ("features",)


def given_text(options: Mapping[str, Any]) -> str:
    """The options that are not left at their defaults, as text; their values are in one line."""
    given = {k: v for k, v in options.items() if v is not None and not _empty(v)}
    return ", ".join(f"{k}={' '.join(repr(v).split())}" for k, v in given.items())


def _empty(value: Any) -> bool:
    return isinstance(value, list | tuple | dict) and not value
