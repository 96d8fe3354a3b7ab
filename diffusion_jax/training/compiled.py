"""The training step on a mesh: state sharded from birth, one compiled program, state donated."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from diffusion_jax.networks import compiler_options
from diffusion_jax.parallel.flops import count_flops
from diffusion_jax.parallel.mesh import batch_sharding, replicated
from diffusion_jax.parallel.sharding import shardings_for, with_shardings
from diffusion_jax.training.metrics import metric_names, pack
from diffusion_jax.training.state import TrainState
from diffusion_jax.training.step import Trainer

PyTree = Any


@dataclasses.dataclass(frozen=True)
class CompiledTrainer:
    """A `Trainer` on a mesh.

    Attributes:
        trainer: the pure functions.
        mesh: device mesh with the axes of `parallel.mesh`.
        min_size: parameters with fewer elements are replicated.
        deterministic: bit-reproducible kernels on GPU; CPU and TPU always are.
    """

    trainer: Trainer
    mesh: Mesh
    min_size: int = 2**14
    deterministic: bool = False

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state; all that compiling and restoring need."""
        shapes = jax.eval_shape(self.trainer.init)
        return with_shardings(shapes, shardings_for(shapes, self.mesh, min_size=self.min_size))

    @property
    def state_shardings(self) -> PyTree:
        """The sharding of every leaf of the state."""
        return jax.tree.map(lambda a: a.sharding, self.abstract_state)

    def init(self, params: PyTree | None = None) -> TrainState:
        """Builds the state inside jit, so that no device ever holds all of it.

        Args:
            params: parameters to begin with, like those of `initial_params`; None: fresh ones.
        """
        return self._once(self.trainer.init, self.state_shardings)(params)

    def initial_params(self) -> PyTree:
        """Fresh float32 parameters, where the state would have them."""
        return self._once(self.trainer.initial_params, self.state_shardings.params)()

    def _once(self, function: Callable[..., Any], shardings: PyTree) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with jax.set_mesh(self.mesh):
                return jax.jit(
                    function,
                    out_shardings=shardings,
                    compiler_options=compiler_options(run_once=True),
                )(*args)

        return run

    def abstract_batch(self, local_batch: Mapping[str, Any], batch_size: int) -> PyTree:
        """The global batch that process-local examples like `local_batch` make up."""
        sharding = batch_sharding(self.mesh)
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct((batch_size, *a.shape[1:]), a.dtype, sharding=sharding),
            dict(local_batch),
        )

    def metric_names(self, batch: PyTree, frozen: PyTree) -> tuple[str, ...]:
        """Names of the rows of the packed metrics."""
        _, metrics = jax.eval_shape(self.trainer.train_step, self.abstract_state, frozen, batch)
        return metric_names(metrics)

    def forward_flops(self, batch: PyTree, frozen: PyTree) -> float:
        """Analytic FLOPs of one forward pass of the objective over a global batch."""
        size = jax.tree.leaves(batch)[0].shape[0]
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), size))
        stratum = jax.ShapeDtypeStruct((size,), "float32")
        evaluate = functools.partial(self.trainer.evaluate, cells=size)
        state = self.abstract_state
        found = count_flops(evaluate, state.params, state, frozen, batch, keys, stratum)
        return float(found)

    def lower(self, batch: PyTree, frozen: PyTree) -> jax.stages.Lowered:
        """Lowers `(state, frozen, batch) -> (state, packed metrics, bad examples)`.

        Args:
            batch: arrays or shapes of a global batch.
            frozen: arrays or shapes (with shardings) of the frozen trees.
        """

        def step(state: TrainState, frozen: PyTree, batch: PyTree) -> Any:
            state, metrics = self.trainer.train_step(state, frozen, batch)
            return state, pack(metrics), metrics.bad_examples

        whole = replicated(self.mesh)
        with jax.set_mesh(self.mesh):
            return jax.jit(
                step,
                in_shardings=(
                    self.state_shardings,
                    jax.tree.map(lambda a: a.sharding, frozen),
                    batch_sharding(self.mesh),
                ),
                out_shardings=(self.state_shardings, whole, whole),
                donate_argnums=0,
                compiler_options=self._options(),
            ).lower(self.abstract_state, frozen, batch)

    def _options(self) -> dict[str, Any]:
        options = compiler_options()
        if self.deterministic:
            options["xla_gpu_deterministic_ops"] = True
        return options
