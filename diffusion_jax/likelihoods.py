"""Bits per dimension of any workdir: `diffusion_jax.bits_per_dim("runs/digits")`.

`python -m diffusion_jax.evaluate` prints them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_jax import builders, data, workdir
from diffusion_jax.data.arrays import ArraySource
from diffusion_jax.errors import ConfigError, unknown_name
from diffusion_jax.evaluation.likelihood import (
    Likelihood,
    LikelihoodEvaluator,
    LikelihoodOptions,
)
from diffusion_jax.loading import load
from diffusion_jax.parallel.arrays import global_batch
from diffusion_jax.parallel.mesh import batch_shards, process_rows
from diffusion_jax.pipelines.options import whole
from diffusion_jax.pipelines.pixel import PixelPipeline

SPLITS = ("train", "validation")


def bits_per_dim(
    model: str | Path | PixelPipeline,
    examples: data.Source | np.ndarray | None = None,
    *,
    num: int | None = None,
    split: str = "validation",
    batch_size: int = 64,
    ema: str | None = None,
    **options: Any,
) -> Likelihood:
    """-log2 p of examples under a trained model, per dimension, with its standard error.

    Of a model that reads labels, captions or numbers it is p given those of the examples.

    Args:
        model: a workdir, or what `load` returns.
        examples: a source, or an array [n, ...] of values as the model was trained on; None takes
            the data of the workdir.
        num: how many, from the first; None for all.
        split: of the workdir's data: "validation" or "train".
        batch_size: changes nothing but speed and memory, but for the spread "batch".
        ema: of a workdir: another stored average; "" takes the raw weights.
        **options: fields of `LikelihoodOptions` (method, steps, draws, seed, ...).

    Raises:
        ConfigError: no such workdir, an unknown option or a value out of range, a method that
            cannot do this process, examples of another shape.
        DataError: the data cannot be read.
    """
    known = inspect.signature(LikelihoodOptions).parameters
    for name in options:
        if name not in known:
            raise ConfigError(unknown_name("option", name, known))
    chosen = LikelihoodOptions(**options)
    num = None if num is None else whole("num", num, low=1)
    batch_size = whole("batch_size", batch_size, low=1)
    source = _source(model, examples, split)
    if isinstance(model, PixelPipeline):
        if ema is not None:
            raise ConfigError(f"ema={ema!r}: a loaded model has its weights; leave it")
        pipeline = model
    else:
        pipeline = load(model, ema=ema, weak="")
    _check_spec(source.spec, pipeline)
    evaluator = LikelihoodEvaluator(
        denoiser=pipeline.denoiser,
        process_of=pipeline.process_of or (lambda params: pipeline.process),
        spec=pipeline.spec,
        conditions=pipeline.conditions,
        options=chosen,
        mesh=pipeline.mesh,
    )
    return evaluator(pipeline.params, _batches(source, pipeline.mesh, batch_size, num))


def _source(model: Any, examples: Any, split: str) -> Any:
    if split not in SPLITS:
        raise ConfigError(unknown_name("split", split, SPLITS))
    if examples is None:
        if isinstance(model, PixelPipeline):
            raise ConfigError("examples=None: a loaded model does not know its data; give some")
        return builders.source(workdir.read_config(model), split)
    if not isinstance(examples, np.ndarray):
        return examples
    spec = model.spec if isinstance(model, PixelPipeline) else workdir.read_spec(model)
    if examples.shape[1:] != spec.shape:
        raise ConfigError(
            f"examples has shape {examples.shape}; expected [n, {', '.join(map(str, spec.shape))}]"
        )
    x = examples if spec.kind == "tokens" else examples.astype(np.float32)
    return ArraySource(spec=spec, x=x, example_ids=np.arange(len(x), dtype=np.int64))


def _check_spec(spec: data.DataSpec, pipeline: PixelPipeline) -> None:
    own = pipeline.spec
    if (spec.shape, spec.kind) != (own.shape, own.kind):
        raise ConfigError(
            f"examples are {spec.kind} of shape {spec.shape}; the model's are {own.kind} of "
            f"{own.shape}"
        )


def _batches(
    source: Any, mesh: Any, size: int, num: int | None
) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    count = len(source) if num is None else min(num, len(source))
    parts = batch_shards(mesh)
    size = -(-min(size, count) // parts) * parts
    rows = process_rows(mesh, size)
    for local in data.sequential_batches(source, size, count, rows=rows):
        yield local, global_batch(local, mesh)
