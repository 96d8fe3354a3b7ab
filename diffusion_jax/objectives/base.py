"""The contract between an objective and the engine.

    objective(params, batch, key, context) -> (loss, Aux)

is pure, differentiable in `params` and knows no device. The engine trains anything of this shape:
a denoiser, an autoencoder with its discriminator, a prior, a distilled student. A plain function
is enough; `Objective` adds the optional declarations with their defaults.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Key

PyTree = Any
Batch = Mapping[str, Any]
Metrics = Mapping[str, tuple[Any, Any]]
"""Scalar name -> (sum, count). Pairs add up over micro-batches, devices and steps."""

OBJECTIVE = "objective"
"""Where parameters of the objective lie among those of the network. Being beside them, not above,
they change no path of the network's own: checkpoints with and without them are read alike."""


class Context(NamedTuple):
    """What an objective may read besides parameters and data.

    Attributes:
        step: number of the update being made, counted from 0.
        ema: the named moving averages, `{name: params}`.
        extra: the objective's own state (for example running statistics or a learned grid).
        frozen: trees that are never trained (teachers, encoders), arguments of the compiled step.
        stratum: [B] index of each example in the global batch, divided by the batch size; for
            low-discrepancy draws over the whole batch.
        cells: the number of examples over which `stratum` is spread, the global batch size.
        training: False when the objective is evaluated on held-out data: then neither dropout nor
            dropped conditioning belongs in it.
    """

    step: Any
    ema: Mapping[str, PyTree]
    extra: PyTree
    frozen: Mapping[str, PyTree]
    stratum: Float[Array, " batch"]
    cells: int
    training: bool = True


class Aux(NamedTuple):
    """What an objective returns besides the loss.

    Attributes:
        metrics: scalar name -> (sum, count).
        extra: the new `extra` state.
        example_loss: optional [B] loss of each example, in the unit of the loss, by which the guard
            names bad examples.
    """

    metrics: Metrics
    extra: PyTree
    example_loss: Any = None


class ObjectiveFn(Protocol):
    """The one required shape of an objective."""

    def __call__(
        self, params: PyTree, batch: Batch, key: Key[Array, " batch"], context: Context
    ) -> tuple[Any, Aux]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Parameters with an optimizer and an update period of their own.

    Attributes:
        name: name of the group, used in the optimizer state.
        pattern: regular expression searched in the parameter path (`a/b/kernel`).
        optimizer: gradient transformation of the group; None takes the run's own.
        period: the group is updated at steps divisible by `period`.
    """

    name: str
    pattern: str
    optimizer: optax.GradientTransformation | None = None
    period: int = 1


def no_params(key: Key[Array, ""]) -> dict[str, PyTree]:
    """An objective without parameters of its own."""
    return {}


def no_extra(params: PyTree) -> PyTree:
    """An objective without state of its own."""
    return {}


def keep_params(params: PyTree, context: Context) -> PyTree:
    """A post-update that changes nothing."""
    return params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """An objective function with its declarations.

    Attributes:
        function: `(params, batch, key, context) -> (loss, Aux)`; `key` holds one key per example,
            derived from the example's global position.
        init_params: `key -> {name: ...}`, parameters that belong to the objective, such as a
            projection; float32. They are trained as `params["objective"]`.
        init_extra: `params -> extra`, the first value of the objective's own state.
        groups: parameter groups; parameters that match none belong to the default group.
        post_update: `(params, context) -> params`, applied after each update (for example to
            bring weights back to unit norm).
    """

    function: Callable[..., tuple[Any, Aux]]
    init_params: Callable[[Key[Array, ""]], dict[str, PyTree]] = no_params
    init_extra: Callable[[PyTree], PyTree] = no_extra
    groups: tuple[ParameterGroup, ...] = ()
    post_update: Callable[[PyTree, Context], PyTree] = keep_params

    def __call__(
        self, params: PyTree, batch: Batch, key: Key[Array, " batch"], context: Context
    ) -> tuple[Any, Aux]:
        return self.function(params, batch, key, context)


def network_params(params: PyTree) -> PyTree:
    """The parameters without those of the objective: what networks and samplers take."""
    if not isinstance(params, Mapping) or OBJECTIVE not in params:
        return params
    return {name: tree for name, tree in params.items() if name != OBJECTIVE}


def masked_mean(
    values: Float[Array, " batch"], mask: Bool[Array, " batch"] | None
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Mean of per-example values, with the (sum, count) that made it.

    Args:
        values: [B] one value per example.
        mask: [B] True where the example is real, False where it pads a batch; None keeps all.

    Returns:
        mean, sum and count. The mean of no example is 0.
    """
    keep = jnp.ones_like(values) if mask is None else mask.astype(values.dtype)
    total = jnp.sum(jnp.where(keep > 0, values, 0.0))
    count = jnp.sum(keep)
    return total / jnp.maximum(count, 1.0), total, count
