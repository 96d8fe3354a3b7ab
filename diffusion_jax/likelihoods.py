"""Bits per dimension of any workdir: `diffusion_jax.bits_per_dim("runs/digits")`.

`python -m diffusion_jax.evaluate` prints them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffusion_jax import builders, data, workdir
from diffusion_jax.errors import ConfigError, unknown_name
from diffusion_jax.evaluation.likelihood import (
    Likelihood,
    LikelihoodEvaluator,
    LikelihoodOptions,
)
from diffusion_jax.evaluation.pixel_levels import levels_of
from diffusion_jax.examples import as_source
from diffusion_jax.loading import load
from diffusion_jax.parallel.arrays import global_batch
from diffusion_jax.parallel.mesh import batch_shards, process_rows
from diffusion_jax.pipelines.options import whole
from diffusion_jax.pipelines.pixel import PixelPipeline

SPLITS = ("train", "validation")
Examples = data.Source | np.ndarray | jax.Array | Sequence[Any]


def bits_per_dim(
    model: str | Path | PixelPipeline,
    examples: Examples | None = None,
    *,
    conditioning: Mapping[str, Any] | None = None,
    num: int | None = None,
    split: str = "validation",
    batch_size: int = 64,
    ema: str | None = None,
    progress: Callable[[int], None] | None = None,
    **options: Any,
) -> Likelihood:
    """-log2 p of examples under a trained model, per dimension, with its standard error.

    Of a model that reads labels, captions or numbers it is p given those of the examples.

    Args:
        model: a workdir, or what `load` returns.
        examples: a source, or an array [n, ...] of values as the model was trained on (images in
            -1 to 1, bits 0 or 1, whole numbers for tokens); None takes the data of the workdir.
        conditioning: of an array, for each condition that the model reads the values of all n:
            label, numbers or names of classes; text, captions; scalar, rows of numbers.
        num: how many, from the first; None for all.
        split: of the workdir's data: "validation" or "train".
        batch_size: changes nothing but speed and memory.
        ema: of a workdir: another stored average; "" takes the raw weights.
        progress: called with the number of examples done.
        **options: fields of `LikelihoodOptions` (method, steps, draws, seed, ...).

    Raises:
        ConfigError: no such workdir, an unknown option or a value out of range, a method that
            cannot do this process, examples of another shape or out of their range, or without
            what the model reads beside them.
        DataError: the data cannot be read.
    """
    known = inspect.signature(LikelihoodOptions).parameters
    for name in options:
        if name not in known:
            raise ConfigError(unknown_name("option", name, known))
    chosen = LikelihoodOptions(**options)
    if split not in SPLITS:
        raise ConfigError(unknown_name("split", split, SPLITS))
    num = None if num is None else whole("num", num, low=1)
    batch_size = whole("batch_size", batch_size, low=1)
    pipeline = _loaded(model, ema)
    if examples is None:
        examples = _own(model, split)
    source = as_source(examples, conditioning, pipeline)
    evaluator = LikelihoodEvaluator(
        denoiser=pipeline.denoiser,
        process_of=pipeline.process_of or (lambda params: pipeline.process),
        spec=pipeline.spec,
        conditions=pipeline.conditions,
        options=chosen,
        levels=levels_of(source, chosen.levels),
        mesh=pipeline.mesh,
        sigma_data=pipeline.sigma_data,
    )
    return evaluator(pipeline.params, _batches(source, pipeline, batch_size, num, progress))


def _loaded(model: str | Path | PixelPipeline, ema: str | None) -> PixelPipeline:
    if not isinstance(model, PixelPipeline):
        # Nothing is sampled: a weaker model of autoguidance may be gone.
        return load(model, ema=ema, weak="")
    if ema is not None:
        raise ConfigError(f"ema={ema!r}: a loaded model has its weights; leave it")
    return model


def _own(model: str | Path | PixelPipeline, split: str) -> data.Source:
    """The data of a workdir."""
    if isinstance(model, PixelPipeline):
        raise ConfigError("examples=None: a loaded model does not know its data; give some")
    return builders.source(workdir.read_config(model), split)


def _batches(
    source: Any,
    pipeline: PixelPipeline,
    size: int,
    num: int | None,
    progress: Callable[[int], None] | None,
) -> Iterator[Mapping[str, Any]]:
    count = len(source) if num is None else min(num, len(source))
    parts = batch_shards(pipeline.mesh)
    size = -(-min(size, count) // parts) * parts
    rows = process_rows(pipeline.mesh, size)
    for number, local in enumerate(data.sequential_batches(source, size, count, rows=rows)):
        if progress is not None:
            progress(number * size)
        for name in pipeline.conditions:
            if name not in local["conditioning"]:
                raise ConfigError(f"examples have no {name}, which the model reads; expected some")
        yield global_batch(local, pipeline.mesh)
