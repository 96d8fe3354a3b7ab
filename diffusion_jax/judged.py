"""Samples of a pipeline, judged by a feature network against a reference."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffusion_jax import builders, data, start
from diffusion_jax.errors import ConfigError
from diffusion_jax.evaluation import caption_score, references, report
from diffusion_jax.evaluation import metrics as image_metrics
from diffusion_jax.evaluation.collected import Collected
from diffusion_jax.evaluation.features.extract import Extractor
from diffusion_jax.evaluation.metrics import Reference
from diffusion_jax.evaluation.nearest import Neighbours
from diffusion_jax.feature_networks import caption_extractor, feature_network
from diffusion_jax.pipelines.counting import network_evaluations
from diffusion_jax.pipelines.options import SamplingOptions
from diffusion_jax.pipelines.pixel import PixelPipeline

FOLDER = "evaluation"
ROUNDING = "round((x + 1) * 127.5) to uint8"
SPLITS = ("train", "validation")
_OPTIONS = {field.name for field in dataclasses.fields(SamplingOptions)}


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
        note: Callable[[str], None],
    ) -> Judged:
        if pipeline.spec.kind != "image":
            raise ConfigError(
                f"metrics={','.join(names)}: the data are {pipeline.spec.kind}, no pictures; "
                "expected bpd"
            )
        scored = caption_score.METRIC in names
        captions = caption_extractor(features, pipeline.mesh) if scored else None
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
        captions = self.captions and caption_score.CaptionStream(self.captions)
        if captions is not None:
            caption_score.check_prompts(options.get("prompts"))
        collected = Collected(num, wanted, under.seed, captions)
        near = Neighbours(num) if "nearest" in self.names else None
        done = 0
        for samples in pipeline.stream(num, seed=under.seed, **options):
            collected.add(samples.x, self.extractor, samples.label, samples.finite, samples.text)
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


def _given(options: Mapping[str, Any]) -> str:
    """The options that are not left at their defaults, as text."""
    return ", ".join(f"{k}={v!r}" for k, v in options.items() if v is not None and v != [])
