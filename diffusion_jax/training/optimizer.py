"""Optimizers: clipping, a direction (AdamW or Muon), weight decay, learning rate; and groups.

Two kinds of groups meet here. A `RateGroup`, from the config, gives some parameters a learning
rate or decay of their own inside one optimizer. A `ParameterGroup`, from the objective, gives them
an optimizer (and a period) of their own: a discriminator, a learned log-variance.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from diffusion_jax.errors import ConfigError
from diffusion_jax.objectives.base import ParameterGroup
from diffusion_jax.parallel.sharding import path_name
from diffusion_jax.training.clipping import adaptive_clip
from diffusion_jax.training.muon import ADAMW_PATTERN, scale_by_muon_or
from diffusion_jax.training.paths import (
    OBJECTIVE_PARAMS,
    first_match,
    layer_ndim,
    map_with_names,
)
from diffusion_jax.training.rates import RateSchedule, warmup_schedule

__all__ = [
    "RateGroup",
    "adamw",
    "check_groups",
    "every",
    "group_labels",
    "grouped",
    "muon",
    "rate_groups",
    "warmup_schedule",
]
PyTree = Any
DEFAULT_GROUP = "default"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RateGroup:
    """Parameters with a learning rate or a decay of their own; the first group that fits counts.

    Attributes:
        name: for messages.
        pattern: regular expression searched in the parameter path (`blocks/mlp/fc1/kernel`).
        learning_rate: update count -> learning rate; None takes the run's own.
        decay: weight decay; None takes the optimizer's own.
    """

    name: str
    pattern: str
    learning_rate: Callable[[Any], Any] | None = None
    decay: float | None = None


def rate_groups(
    options: Mapping[str, Mapping[str, Any]], schedule: RateSchedule
) -> tuple[RateGroup, ...]:
    """Groups from `{name: {"pattern", "rate", "decay"}}`, the two latter optional or None.

    Args:
        options: by name; `rate` is the peak of the group's learning rate, in the shape of
            `schedule`, and `decay` its weight decay. Taken in alphabetical order of the names.
        schedule: that of the run.

    Raises:
        ConfigError: a field is unknown or missing, a pattern is no regular expression, or a number
            is negative.
    """
    groups = []
    for name, fields in sorted(options.items()):
        where = f"parameter_groups.{name}"
        unknown = set(fields) - {"pattern", "rate", "decay"}
        idle = fields.get("rate") is None and fields.get("decay") is None
        if unknown or idle or not fields.get("pattern"):
            raise ConfigError(
                f"{where}={dict(fields)!r}: expected pattern, and rate or decay or both"
            )
        try:
            re.compile(fields["pattern"])
        except re.error as error:
            raise ConfigError(
                f"{where}.pattern={fields['pattern']!r} is no regular expression: {error}"
            ) from None
        rate, decay = fields.get("rate"), fields.get("decay")
        for field, value in (("rate", rate), ("decay", decay)):
            if value is not None and value < 0:
                raise ConfigError(f"{where}.{field}={value!r}: expected at least 0")
        groups.append(
            RateGroup(
                name=name,
                pattern=fields["pattern"],
                learning_rate=None if rate is None else schedule.with_peak(rate),
                decay=decay,
            )
        )
    return tuple(groups)


def check_groups(groups: Sequence[RateGroup], params: PyTree) -> None:
    """Refuses a group that no parameter of `params` (arrays or shapes) belongs to.

    Raises:
        ConfigError: naming the group, and some paths that there are.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    paths = [path_name(path) for path, _ in leaves]
    taken = [first_match(path, groups) for path in paths]
    for group in groups:
        if group not in taken:
            shown = ", ".join(paths[:: max(len(paths) // 5, 1)][:5])
            raise ConfigError(
                f"parameter_groups.{group.name}.pattern={group.pattern!r} matches no parameter "
                f"that is not in a group before it; parameters are such as {shown}"
            )


def adamw(
    learning_rate: Callable[[Any], Any],
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip_norm: float | None = 1.0,
    adaptive_clip: float | None = None,
    groups: Sequence[RateGroup] = (),
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) after clipping.

    Vectors (biases, norms; stacked ones too) and parameters of the objective are not decayed: a
    decayed scale is a changed function, not a smaller weight.

    Args:
        learning_rate: update count -> learning rate.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: factor on the weights, times the learning rate, taken off at each update.
        clip_norm: largest global norm of the gradient; None for no clipping.
        adaptive_clip: lambda of `clipping.adaptive_clip`, which goes before; None for none.
        groups: parameters with rates or decays of their own.
    """
    direction = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    return _assembled(direction, learning_rate, weight_decay, clip_norm, adaptive_clip, groups)


def muon(
    learning_rate: Callable[[Any], Any],
    *,
    beta: float = 0.95,
    nesterov: bool = True,
    newton_schulz_steps: int = 5,
    rms: float = 0.2,
    adamw_pattern: str = ADAMW_PATTERN,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip_norm: float | None = 1.0,
    adaptive_clip: float | None = None,
    groups: Sequence[RateGroup] = (),
) -> optax.GradientTransformation:
    """Muon for the kernels of hidden layers, AdamW for everything else; see `training.muon`.

    Args:
        learning_rate: of both: Muon's updates are brought to AdamW's size, see `rms`.
        beta: decay of Muon's momentum.
        nesterov: whether the momentum looks one gradient ahead.
        newton_schulz_steps: iterations of the orthogonalisation.
        rms: root mean square of the elements of Muon's direction, whatever the layer's shape.
        adamw_pattern: regular expression of the kernels that AdamW takes.
        b1: AdamW's decay of the first moment; `b2` and `eps` likewise its own.
        b2: see b1.
        eps: see b1.
        weight_decay: as for `adamw`, as the rest.
        clip_norm: as for `adamw`.
        adaptive_clip: as for `adamw`.
        groups: as for `adamw`.
    """
    direction = scale_by_muon_or(
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
        beta=beta,
        nesterov=nesterov,
        steps=newton_schulz_steps,
        rms=rms,
        other_pattern=adamw_pattern,
    )
    return _assembled(direction, learning_rate, weight_decay, clip_norm, adaptive_clip, groups)


def _assembled(
    direction: optax.GradientTransformation,
    learning_rate: Callable[[Any], Any],
    weight_decay: float,
    clip_norm: float | None,
    limit: float | None,
    groups: Sequence[RateGroup],
) -> optax.GradientTransformation:
    """Clipping, direction, decay and rate in a chain. Without groups the chain is made of optax's
    own parts, whose state every checkpoint since the first release has."""
    chain = [] if limit is None else [adaptive_clip(limit)]
    if clip_norm is not None:
        chain.append(optax.clip_by_global_norm(clip_norm))
    chain.append(direction)
    if any(group.decay is not None for group in groups):
        chain.append(_grouped_decay(weight_decay, groups))
    elif weight_decay:
        chain.append(optax.add_decayed_weights(weight_decay, mask=_decays))
    if any(group.learning_rate is not None for group in groups):
        chain.append(_grouped_rate(learning_rate, groups))
    else:
        chain.append(optax.scale_by_learning_rate(learning_rate))
    return optax.chain(*chain)


def _decays(params: PyTree) -> PyTree:
    return map_with_names(_is_decayed, params)


def _is_decayed(path: str, param: Any) -> bool:
    return layer_ndim(path, param) > 1 and not re.search(OBJECTIVE_PARAMS, path)


def _grouped_decay(default: float, groups: Sequence[RateGroup]) -> optax.GradientTransformation:
    def decay(path: str, update: Any, param: Any) -> Any:
        group = first_match(path, groups)
        factor = default if group is None or group.decay is None else group.decay
        return update + factor * param if factor and _is_decayed(path, param) else update

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        return map_with_names(decay, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _grouped_rate(
    default: Callable[[Any], Any], groups: Sequence[RateGroup]
) -> optax.GradientTransformation:
    """As `optax.scale_by_learning_rate`, with its state, for several rates at once."""

    def init(params: PyTree) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        def scale(path: str, update: Any) -> Any:
            group = first_match(path, groups)
            own = default if group is None or group.learning_rate is None else group.learning_rate
            return -own(state.count) * update

        count = optax.safe_increment(state.count)
        return map_with_names(scale, updates), optax.ScaleByScheduleState(count=count)

    return optax.GradientTransformation(init, update)


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

    def label(path: str, _: Any) -> str:
        group = first_match(path, groups)
        return DEFAULT_GROUP if group is None else group.name

    return map_with_names(label, params)


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
