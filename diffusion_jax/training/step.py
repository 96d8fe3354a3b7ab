"""The training step: a pure function of (state, frozen trees, batch), for any objective."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Key

from diffusion_jax.errors import ConfigError, named
from diffusion_jax.objectives.base import OBJECTIVE, Aux, Batch, Context, Objective
from diffusion_jax.training import ema, guard
from diffusion_jax.training.optimizer import grouped
from diffusion_jax.training.precision import Precision, as_float32
from diffusion_jax.training.state import TrainState, advance, example_keys, strata

PyTree = Any
TRAIN_STREAM, VALIDATION_STREAM, INIT_STREAM, OBJECTIVE_STREAM, ROUNDING_STREAM = range(5)


class StepMetrics(NamedTuple):
    """What one step reports.

    Attributes:
        scalars: name -> (sum, count); a skipped step has count 0 everywhere but in `skipped`.
        bad_examples: [B] True where the example's own loss is not finite.
    """

    scalars: Mapping[str, tuple[Any, Any]]
    bad_examples: Bool[Array, " batch"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Trainer:
    """Pure functions of the state; holds no arrays.

    Attributes:
        objective: what is minimised.
        init_params: key -> nested dict of float32 parameters.
        optimizer: transformation of the default parameter group.
        learning_rate: update count -> learning rate, for the log.
        ema_decays: `{name: decay}` of the exponential moving averages.
        ema_warmup: whether these start short.
        ema_powers: `{name: sigma_rel}` of the power function averages; other names.
        precision: how parameters are kept between updates.
        seed: with the state, the source of every random number.
        accumulation: micro-batches a step; the batch size must be a multiple of it.
    """

    objective: Objective
    init_params: Callable[[Key[Array, ""]], PyTree]
    optimizer: optax.GradientTransformation
    learning_rate: Callable[[Any], Any] | None = None
    ema_decays: Mapping[str, float] = dataclasses.field(default_factory=dict)
    ema_warmup: bool = True
    ema_powers: Mapping[str, float] = dataclasses.field(default_factory=dict)
    precision: Precision = dataclasses.field(default_factory=Precision)
    seed: int = 0
    accumulation: int = 1

    def __post_init__(self) -> None:
        twice = sorted({*self.ema_decays} & {*self.ema_powers})
        if twice:
            raise ConfigError(
                f"ema.powers.{twice[0]}: ema.decays has an average of that name too; rename one"
            )
        for name, sigma_rel in self.ema_powers.items():
            with named(f"ema.powers.{name}: "):
                ema.gamma_of(sigma_rel)

    def key(self, stream: int) -> Key[Array, ""]:
        """Root key of a stream: training, validation and initialisation never share noise."""
        return jax.random.fold_in(jax.random.key(self.seed), stream)

    @property
    def transformation(self) -> optax.GradientTransformation:
        """The optimizer over all parameter groups."""
        return grouped(self.objective.groups, self.optimizer)

    def init(self, params: PyTree | None = None) -> TrainState:
        """State before the first update. Traceable: meant to run inside jit, already sharded.

        Args:
            params: float32 parameters to begin with, like those of `initial_params`, the default.
        """
        first: Any = self.initial_params() if params is None else params
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            examples=jnp.zeros((2,), jnp.uint32),
            params=self.precision.stored(first, self._rounding_key(-1)),
            opt_state={
                "optimizer": self.transformation.init(first),
                "guard": guard.init(),
                **self.precision.extra_state(first),
            },
            ema={name: first for name in (*self.ema_decays, *self.ema_powers)},
            extra=self.objective.init_extra(first),
        )

    def initial_params(self) -> PyTree:
        """Float32 parameters of the network and, under a name of their own, of the objective."""
        params = self.init_params(self.key(INIT_STREAM))
        own = self.objective.init_params(self.key(OBJECTIVE_STREAM))
        if not own:
            return params
        if OBJECTIVE in params:
            raise ValueError(f"the network may not have parameters called {OBJECTIVE!r}")
        return {**params, OBJECTIVE: own}

    def _rounding_key(self, step: Any) -> Key[Array, ""]:
        return jax.random.fold_in(self.key(ROUNDING_STREAM), jnp.asarray(step + 1, jnp.uint32))

    def train_step(
        self, state: TrainState, frozen: Mapping[str, PyTree], batch: Batch
    ) -> tuple[TrainState, StepMetrics]:
        """One update.

        Args:
            state: donated by the compiled version.
            frozen: trees that are never trained.
            batch: `{"x": [B, ...], "conditioning": {name: [B, ...]}, ...}`, the global batch.

        Returns:
            the next state, and metrics. A non-finite loss or gradient leaves everything but the
            counters as it was.
        """
        batch_size = jax.tree.leaves(batch)[0].shape[0]
        keys = example_keys(self.key(TRAIN_STREAM), state.examples, batch_size)
        loss, grads, aux = self._gradients(state, frozen, batch, keys)
        grad_norm = optax.tree.norm(grads)
        full = self.precision.full(state.params, state.opt_state)
        updates, optimizer = self.transformation.update(grads, state.opt_state["optimizer"], full)
        stratum = strata(batch_size)
        context = Context(state.step, state.ema, aux.extra, frozen, stratum, batch_size)
        full = self.objective.post_update(optax.apply_updates(full, updates), context)
        # A finite gradient can still end in NaN (a zero moment over a zero eps, a post-update).
        finite = guard.is_finite((loss, grad_norm), full, aux.extra)
        params = self.precision.stored(full, self._rounding_key(state.step))
        averages = ema.update(
            state.ema,
            full,
            self._updates(state),
            self.ema_decays,
            warmup=self.ema_warmup,
            powers=self.ema_powers,
        )
        new = {"optimizer": optimizer, **self.precision.extra_state(full)}
        old = {name: state.opt_state[name] for name in new}
        params, kept, averages, extra = guard.select(
            finite,
            (params, new, averages, aux.extra),
            (state.params, old, state.ema, state.extra),
        )
        state_after = TrainState(
            step=state.step + 1,
            examples=advance(state.examples, batch_size),
            params=params,
            opt_state={**kept, "guard": guard.count(state.opt_state["guard"], finite)},
            ema=averages,
            extra=extra,
        )
        return state_after, self._metrics(state, aux, loss, grad_norm, finite, batch_size)

    def evaluate(
        self,
        params: PyTree,
        state: TrainState,
        frozen: Mapping[str, PyTree],
        batch: Batch,
        keys: Key[Array, " batch"],
        stratum: Float[Array, " batch"],
        cells: int,
    ) -> Mapping[str, tuple[Any, Any]]:
        """The objective's metrics on a batch with given keys; nothing is updated or dropped out.

        `batch["mask"]` [B], if present, marks padding with False.
        """
        context = Context(state.step, state.ema, state.extra, frozen, stratum, cells, False)
        _, aux = self.objective(params, batch, keys, context)
        return aux.metrics

    def _updates(self, state: TrainState) -> Any:
        """Updates really made: skipped steps do not age the averages."""
        return state.step - state.opt_state["guard"]["skipped"]

    def _gradients(
        self, state: TrainState, frozen: Mapping[str, PyTree], batch: Batch, keys: Any
    ) -> tuple[Any, PyTree, Aux]:
        """Loss, float32 gradients and Aux of the whole batch, micro-batch by micro-batch."""
        value_and_grad = jax.value_and_grad(self.objective, has_aux=True)
        count = self.accumulation
        stratum = strata(keys.shape[0])
        if count == 1:
            context = Context(state.step, state.ema, state.extra, frozen, stratum, len(keys))
            (loss, aux), grads = value_and_grad(state.params, batch, keys, context)
            return loss, as_float32(grads), aux

        # Rows i::count form micro-batch i, so that no example leaves the device that holds it.
        micro = jax.tree.map(
            lambda a: jnp.moveaxis(a.reshape(a.shape[0] // count, count, *a.shape[1:]), 1, 0),
            (batch, keys, stratum),
        )

        def body(carry: Any, part: Any) -> tuple[Any, Any]:
            extra, grads = carry
            part_batch, part_keys, part_stratum = part
            context = Context(state.step, state.ema, extra, frozen, part_stratum, len(keys))
            (loss, aux), part_grads = value_and_grad(state.params, part_batch, part_keys, context)
            grads = jax.tree.map(lambda g, p: g + p.astype(g.dtype) / count, grads, part_grads)
            return (aux.extra, grads), (loss, aux.metrics, aux.example_loss)

        zeros = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.float32), state.params)
        (extra, grads), (losses, metrics, example) = jax.lax.scan(body, (state.extra, zeros), micro)
        metrics = jax.tree.map(lambda a: jnp.sum(a, axis=0), metrics)
        if example is not None:
            example = jnp.moveaxis(example, 0, 1).reshape(-1)
        return jnp.mean(losses), grads, Aux(metrics, extra, example)

    def _metrics(
        self, state: TrainState, aux: Aux, loss: Any, grad_norm: Any, finite: Any, batch_size: int
    ) -> StepMetrics:
        one = jnp.ones(())
        scalars = {"loss": (loss, one), **aux.metrics, "grad_norm": (grad_norm, one)}
        if self.learning_rate is not None:
            scalars["learning_rate"] = (self.learning_rate(self._updates(state)), one)
        kept = {
            name: (jnp.where(finite, total, 0.0), jnp.where(finite, count, 0.0))
            for name, (total, count) in scalars.items()
        }
        kept["skipped"] = (jnp.where(finite, 0.0, 1.0), one)
        if aux.example_loss is None:
            bad = jnp.zeros((batch_size,), bool)
        else:
            bad = ~jnp.isfinite(aux.example_loss)
        return StepMetrics(kept, bad)
