"""The training objective of a trained run on held-out data: `evaluate --metrics=loss`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffusion_jax import builders, data
from diffusion_jax.diffusion.likelihood import estimate
from diffusion_jax.errors import ConfigError
from diffusion_jax.evaluation import report
from diffusion_jax.evaluation.metrics import Score
from diffusion_jax.parallel.arrays import global_batch
from diffusion_jax.parallel.mesh import batch_shards, process_rows
from diffusion_jax.pipelines.pixel import PixelPipeline
from diffusion_jax.training.state import TrainState
from diffusion_jax.training.validation import Validator

LOSS, BINS = "loss", "loss_logsnr/"


def loss_rows(
    config: Any,
    source: data.Source,
    pipeline: PixelPipeline,
    split: str,
    num: int,
    under: report.Circumstances,
    watch: Callable[[int], None],
) -> list[dict[str, Any]]:
    """Rows of the loss as a whole and, of an objective that reports them, by noise level.

    Times and noise are those of the validation of the training: `val/loss_ema` in metrics.jsonl is
    the same number where `config.validation.examples` are as many examples. They are drawn by the
    seed of the run and spread over the examples, not drawn for each by itself: the standard errors,
    those of independent draws, are rather too large. Of an alignment nothing is in it.

    Args:
        config: of the workdir.
        source: of the examples.
        pipeline: with the weights that are judged.
        split: what they are called.
        num: examples, from the first; all where they are fewer.
        under: what else decides the rows.
        watch: is told how many examples are done, and may raise.

    Raises:
        ConfigError: the split has no examples.
        DataError: the data cannot be read.
    """
    began = time.perf_counter()
    count = min(num, len(source))
    if not count:
        raise ConfigError(f"split={split!r}: {config.data.name} has no examples there for a loss")
    built = builders.model(config, pipeline.spec)
    validator = Validator(
        trainer=builders.trainer(config, built),
        batches=lambda: _batches(config, source, pipeline, count, watch),
        count=count,
        mesh=pipeline.mesh,
    )
    # No objective reads more of a state than this where it trains nothing.
    state = TrainState(jnp.int32(under.step), None, None, None, {}, {})
    scores = _scores(validator.examples(pipeline.params, state, {}), config.objective.name)
    more = {"seed": config.seed, "reference": f"{config.data.name} {split}"}
    return report.rows(
        scores, dataclasses.replace(under, seconds=time.perf_counter() - began, **more)
    )


def _batches(
    config: Any,
    source: data.Source,
    pipeline: PixelPipeline,
    count: int,
    watch: Callable[[int], None],
) -> Iterator[Mapping[str, Any]]:
    parts = batch_shards(pipeline.mesh)
    size = -(-min(config.validation.batch_size or config.batch_size, count) // parts) * parts
    rows = process_rows(pipeline.mesh, size)
    for number, local in enumerate(data.sequential_batches(source, size, count, rows=rows)):
        watch(number * size)
        yield global_batch(local, pipeline.mesh)


def _scores(found: Mapping[str, np.ndarray], objective: str) -> list[Score]:
    """The loss, then its bins from the noisiest; one that holds no example is left out."""
    bins = []
    for name in found:
        if name.startswith(BINS):
            low, high = (float(end) for end in name.removeprefix(BINS).split(".."))
            bins.append((low, f"{LOSS} at logsnr {low:g} to {high:g}", name))
    names = {LOSS: LOSS, **{title: name for _, title, name in sorted(bins)}}
    seen = {title: found[name][found[name][:, 1] > 0, 0] for title, name in names.items()}
    return [
        Score(
            name=title,
            estimate=estimate(values),
            remark=f"objective {objective}",
            metric=LOSS,
        )
        for title, values in seen.items()
        if len(values)
    ]
