"""Learning-rate schedules and optimizers, and parameter groups with periods of their own."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from diffusion_jax.errors import unknown_name
from diffusion_jax.objectives.base import ParameterGroup

PyTree = Any
DEFAULT_GROUP = "default"


def warmup_schedule(
    name: str, peak: float, *, steps: int, warmup_steps: int = 0, final_scale: float = 0.0
) -> Callable[[Any], Any]:
    """Linear warm-up from 0 to `peak`, then the named decay.

    Args:
        name: "constant" or "cosine" (Loshchilov & Hutter 2017, eq. 5, one cycle).
        peak: highest learning rate.
        steps: updates of the whole run, warm-up included.
        warmup_steps: updates until the peak is reached.
        final_scale: the cosine ends at `final_scale * peak`.

    Raises:
        ValueError: unknown name, or a warm-up longer than the run.
    """
    if name not in ("constant", "cosine"):
        raise ValueError(unknown_name("optimizer.schedule", name, ("constant", "cosine")))
    if not 0 <= warmup_steps <= steps:
        raise ValueError(
            f"optimizer.warmup_steps={warmup_steps}: expected 0..{steps} (config.steps)"
        )

    def schedule(count: Any) -> Any:
        count = jnp.asarray(count, jnp.float32)
        warm = (count + 1.0) / max(warmup_steps, 1)
        if name == "constant":
            decayed = jnp.ones_like(count)
        else:
            progress = (count - warmup_steps) / max(steps - warmup_steps, 1)
            half = 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.clip(progress, 0.0, 1.0)))
            decayed = final_scale + (1.0 - final_scale) * half
        return peak * jnp.where(count < warmup_steps, warm, decayed)

    return schedule


def adamw(
    learning_rate: Callable[[Any], Any],
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip_norm: float | None = 1.0,
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) after clipping by global norm.

    Vectors (biases, norms) are not decayed: a decayed scale is a changed function, not a smaller
    weight.
    """
    chain = [] if clip_norm is None else [optax.clip_by_global_norm(clip_norm)]
    chain.append(optax.scale_by_adam(b1=b1, b2=b2, eps=eps))
    if weight_decay:
        chain.append(optax.add_decayed_weights(weight_decay, mask=_matrices))
    chain.append(optax.scale_by_learning_rate(learning_rate))
    return optax.chain(*chain)


def _matrices(params: PyTree) -> PyTree:
    return jax.tree.map(lambda p: p.ndim > 1, params)


class PeriodicState(NamedTuple):
    """State of `every`: steps seen and the state of the wrapped transformation."""

    count: Any
    inner: PyTree


def every(period: int, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Applies `inner` at counts divisible by `period`; in between neither it nor params move."""

    def init(params: PyTree) -> PeriodicState:
        return PeriodicState(jnp.zeros((), jnp.int32), inner.init(params))

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        due = state.count % period == 0
        updates, new = inner.update(updates, state.inner, params)
        updates = jax.tree.map(lambda u: jnp.where(due, u, jnp.zeros_like(u)), updates)
        new = jax.tree.map(lambda a, b: jnp.where(due, a, b), new, state.inner)
        return updates, PeriodicState(state.count + 1, new)

    return optax.GradientTransformation(init, update)


def group_labels(params: PyTree, groups: Sequence[ParameterGroup]) -> PyTree:
    """The group name of every parameter: the first group whose pattern is found in its path."""

    def label(path: Any, _: Any) -> str:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return next((g.name for g in groups if re.search(g.pattern, name)), DEFAULT_GROUP)

    return jax.tree_util.tree_map_with_path(label, params)


def grouped(
    groups: Sequence[ParameterGroup], default: optax.GradientTransformation
) -> optax.GradientTransformation:
    """One transformation for all parameter groups; clipping norms are taken within a group."""
    if not groups:
        return default
    transforms: dict[Hashable, optax.GradientTransformation] = {
        g.name: every(g.period, g.optimizer or default)
        if g.period > 1
        else (g.optimizer or default)
        for g in groups
    }
    transforms[DEFAULT_GROUP] = default
    return optax.multi_transform(transforms, lambda params: group_labels(params, groups))
