"""Examples that a user gives beside a trained model: judged, and made a source."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int64

from diffusion_jax import data
from diffusion_jax.data.arrays import ArraySource
from diffusion_jax.data.text import encode
from diffusion_jax.errors import ConfigError
from diffusion_jax.pipelines.options import label_list, number_rows, text_list
from diffusion_jax.pipelines.pixel import PixelPipeline

SLACK = 1e-5
"""How far pixels may lie outside their range, for rounding."""

ROWS = 256
"""Examples that are read at a time, where their conditions alone are wanted."""


def as_source(examples: Any, conditioning: Any, pipeline: PixelPipeline) -> Any:
    """The examples as a source that fits the model.

    Args:
        examples: a source, or numbers [n, ...].
        conditioning: of an array, see `diffusion_jax.bits_per_dim`.
        pipeline: of the model.

    Raises:
        ConfigError: another shape or kind, values out of range, or not what the model reads.
    """
    if not isinstance(examples, data.Source):
        x = values_of(examples, pipeline.spec)
        given = conditioning_of({} if conditioning is None else conditioning, pipeline, len(x))
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


def values_of(examples: Any, spec: data.DataSpec) -> np.ndarray:
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


def conditioning_of(given: Any, pipeline: PixelPipeline, count: int) -> dict[str, np.ndarray]:
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


def conditions_of(
    conditions: Sequence[str], source: data.Source, rows: Int64[np.ndarray, " n"]
) -> dict[str, Any]:
    """What the examples at `rows` are conditioned by, as arguments of `PixelPipeline.sample`.

    Args:
        conditions: that the model reads: label, text, scalar.
        source: of examples that have them.
        rows: which examples.

    Returns:
        labels, prompts and scalars, those that the model reads; nothing where it reads none.
    """
    if not conditions:
        return {}
    cuts = range(0, len(rows), ROWS)
    parts = [source.fetch(rows[cut : cut + ROWS])["conditioning"] for cut in cuts]
    given = {name: np.concatenate([part[name] for part in parts]) for name in conditions}
    arguments = {"label": "labels", "text": "prompts", "scalar": "scalars"}
    found: dict[str, Any] = {arguments[name]: values for name, values in given.items()}
    if "prompts" in found:
        found["prompts"] = data.decode_text(found["prompts"])
    return found


def held_out_conditions(
    conditions: Sequence[str], held_out: data.Source, num: int
) -> dict[str, Any]:
    """Captions and numbers that the training never saw, for the grids, which have all classes.

    Args:
        conditions: that the model reads.
        held_out: source of the validation.
        num: how many, at most.
    """
    named = [name for name in conditions if name != "label"]
    found = conditions_of(named, held_out, np.arange(min(num, len(held_out))))
    return {"prompts": None, "scalars": None, **found} if found else {}
