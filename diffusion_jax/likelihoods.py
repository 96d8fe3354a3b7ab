"""Bits per dimension of any workdir: `diffusion_jax.bits_per_dim("runs/digits")`.

`python -m diffusion_jax.evaluate` prints them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import builders, data, workdir
from diffusion_jax.data.arrays import ArraySource
from diffusion_jax.data.text import encode
from diffusion_jax.errors import ConfigError, unknown_name
from diffusion_jax.evaluation.likelihood import (
    Likelihood,
    LikelihoodEvaluator,
    LikelihoodOptions,
)
from diffusion_jax.loading import load
from diffusion_jax.parallel.arrays import global_batch
from diffusion_jax.parallel.mesh import batch_shards, process_rows
from diffusion_jax.pipelines.options import label_list, number_rows, text_list, whole
from diffusion_jax.pipelines.pixel import PixelPipeline

SPLITS = ("train", "validation")
SLACK = 1e-5
"""How far pixels may lie outside their range, for rounding."""
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
        batch_size: changes nothing but speed and memory, but for the spread "batch".
        ema: of a workdir: another stored average; "" takes the raw weights.
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
    source = _source(examples, conditioning, pipeline)
    evaluator = LikelihoodEvaluator(
        denoiser=pipeline.denoiser,
        process_of=pipeline.process_of or (lambda params: pipeline.process),
        spec=pipeline.spec,
        conditions=pipeline.conditions,
        options=chosen,
        mesh=pipeline.mesh,
    )
    return evaluator(pipeline.params, _batches(source, pipeline, batch_size, num))


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


def _source(examples: Any, conditioning: Any, pipeline: PixelPipeline) -> Any:
    """The examples as a source that fits the model."""
    if not isinstance(examples, data.Source):
        x = _values(examples, pipeline.spec)
        given = _conditioning({} if conditioning is None else conditioning, pipeline, len(x))
        ids = np.arange(len(x), dtype=np.int64)
        return ArraySource(spec=pipeline.spec, x=x, example_ids=ids, conditioning=given)
    if conditioning is not None:
        raise ConfigError("conditioning: examples of a source have their own; leave it")
    if not len(examples):
        raise ConfigError("examples is a source of none; expected at least one")
    spec, own = examples.spec, pipeline.spec
    if (spec.shape, spec.kind) != (own.shape, own.kind):
        raise ConfigError(
            f"examples are {spec.kind} of shape {spec.shape}; the model's are {own.kind} of "
            f"{own.shape}"
        )
    fields = {"label": "num_classes", "text": "text_length", "scalar": "scalars"}
    for name in pipeline.conditions:
        found, wanted = (getattr(of, fields[name]) for of in (spec, own))
        if found != wanted:
            raise ConfigError(
                f"examples have {fields[name]}={found!r}; the model reads {name}: expected a "
                f"source with {fields[name]}={wanted!r}"
            )
    return examples


def _values(examples: Any, spec: data.DataSpec) -> np.ndarray:
    """Values as the model was trained on: int32 tokens, float32 of all else."""
    try:
        x = np.asarray(examples)
    except (TypeError, ValueError):  # rows of unequal length
        x = np.empty(0, object)
    shape = f"[n, {', '.join(map(str, spec.shape))}]"
    kinds = (jnp.integer, jnp.floating, jnp.bool_)
    if not any(jnp.issubdtype(x.dtype, kind) for kind in kinds):
        kind = type(examples).__name__
        raise ConfigError(
            f"examples is a {kind}; expected a source, or an array {shape} of numbers"
        )
    if x.shape[1:] != spec.shape or not x.ndim:
        raise ConfigError(f"examples has shape {x.shape}; expected {shape}")
    if not len(x):
        raise ConfigError(f"examples has shape {x.shape}: expected at least one example")
    fits, wanted = _fits(x, spec)
    if not fits:
        raise ConfigError(
            f"examples has {x.dtype} values from {float(x.min()):g} to {float(x.max()):g}; "
            f"expected {wanted}"
        )
    return x.astype(np.int32 if spec.kind == "tokens" else np.float32)


def _fits(x: np.ndarray, spec: data.DataSpec) -> tuple[bool, str]:
    """Whether these are values of such data, and what they are."""
    if spec.kind == "image":
        low, high = spec.range
        wanted = f"pixels from {low:g} to {high:g}; those of 0 to 255 are x / 127.5 - 1"
        # Those of 0 to 255 would pass where they are dark: 0 and 1.
        raw = x.dtype in (np.uint8, np.bool_)
        return not raw and not ((x < low - SLACK) | (x > high + SLACK)).any(), wanted
    if spec.kind == "bits":
        return bool(((x == 0) | (x == 1)).all()), "bits, 0 or 1"
    if spec.kind == "tokens":
        inside = x.min() >= 0 and x.max() < spec.vocabulary
        wanted = f"tokens, whole numbers from 0 to {spec.vocabulary - 1}"
        return bool(inside and not jnp.issubdtype(x.dtype, jnp.floating)), wanted
    return True, ""


_READERS: dict[str, tuple[str, Callable[[Any, data.DataSpec], np.ndarray]]] = {
    "label": ("labels", lambda given, spec: label_list(given, spec.num_classes, spec.classes)),
    "text": (
        "prompts",
        lambda given, spec: encode(text_list(given, spec.text_length), spec.text_length),
    ),
    "scalar": ("scalars", lambda given, spec: number_rows(given, spec.scalars)),
}
"""Condition -> what errors call it, and its array [n, ...] made of what a user gives."""


def _conditioning(given: Any, pipeline: PixelPipeline, count: int) -> dict[str, np.ndarray]:
    if not isinstance(given, Mapping):
        kind = type(given).__name__
        raise ConfigError(f"conditioning is a {kind}; expected a mapping, such as {{'label': [3]}}")
    names = pipeline.conditions
    for name in given:
        if name not in names:
            known = f"reads {', '.join(names)}" if names else "is unconditional"
            raise ConfigError(f"conditioning of {name!r}: the model {known}; leave it")
    found = {}
    for name in names:
        if name not in given:
            raise ConfigError(
                f"examples is an array and the model reads {name}: give conditioning="
                f"{{{name!r}: ...}}, or a source that has it"
            )
        argument, read = _READERS[name]
        try:
            found[name] = read(given[name], pipeline.spec)
        except ConfigError as error:
            message = " ".join(str(error).split()).removeprefix(argument)
            raise ConfigError(f"conditioning[{name!r}]{message}") from error
        if len(found[name]) != count:
            raise ConfigError(
                f"conditioning[{name!r}] has {len(found[name])} values; expected {count}, one for "
                "each example"
            )
    return found


def _batches(
    source: Any, pipeline: PixelPipeline, size: int, num: int | None
) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    count = len(source) if num is None else min(num, len(source))
    parts = batch_shards(pipeline.mesh)
    size = -(-min(size, count) // parts) * parts
    rows = process_rows(pipeline.mesh, size)
    for local in data.sequential_batches(source, size, count, rows=rows):
        for name in pipeline.conditions:
            if name not in local["conditioning"]:
                raise ConfigError(f"examples have no {name}, which the model reads; expected some")
        yield local, global_batch(local, pipeline.mesh)
