"""From trained parameters to data, for models that live in the space of their data.

A sample depends on the seed and its index alone: starting noise and every draw of a solver come
from `fold_in(seed, index)`, so that the number of samples, the batch size and the mesh change
nothing beyond rounding.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key, UInt32

from diffusion_jax.data.spec import DataSpec
from diffusion_jax.diffusion import guidance as guide
from diffusion_jax.diffusion import solvers, thresholding
from diffusion_jax.diffusion.denoiser import Denoiser
from diffusion_jax.errors import ConfigError
from diffusion_jax.networks import compiler_options
from diffusion_jax.parallel.arrays import gather
from diffusion_jax.parallel.mesh import batch_sharding, batch_shards
from diffusion_jax.pipelines.samples import Samples
from diffusion_jax.visual.pixels import to_uint8

PyTree = Any
SAMPLING_STREAM = 4
"""Folded into the seed: training, validation and bounds use other numbers (`training.step`)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How to sample; every field has a flag or an argument of the same name.

    Attributes:
        solver: a name in `solvers.SOLVERS`, or "ancestral" for any process.
        steps: network evaluations along the time grid (solvers of higher order take more).
        guidance: classifier-free guidance; 1 is the conditional model itself.
        interval: times (low, high) between which guidance acts.
        rescale: how far the guided prediction's deviation is brought back to the conditional one's.
        threshold: "none", "static" or "dynamic".
        percentile: of the dynamic threshold.
        solver_options: solver name -> its own options.
        batch_size: samples a compiled batch, over all devices.
    """

    solver: str
    steps: int
    guidance: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0
    threshold: str = "none"
    percentile: float = 0.995
    solver_options: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    batch_size: int = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class PixelPipeline:
    """A trained model that samples.

    Attributes:
        params: parameters, placed on `mesh`.
        denoiser: `(params, conditioning) -> Denoiser`, the network bound to its process.
        process: the forward process, for the prior and ancestral sampling.
        schedule: its schedule, None where ODE solvers do not apply.
        spec: shape and kind of the data; labels condition the model where it has classes.
        conditional: whether the network reads labels.
        guidable: whether it was also trained without labels, as guidance needs.
        times: `steps -> decreasing times from 1 to 0`.
        mesh: where to compute.
        defaults: options that a call may override.
    """

    params: PyTree
    denoiser: Callable[[PyTree, Mapping[str, Any]], Denoiser]
    process: Any
    schedule: Any
    spec: DataSpec
    conditional: bool
    times: Callable[[int], np.ndarray]
    mesh: Mesh
    defaults: SamplingOptions
    guidable: bool = True

    def sample(
        self,
        num: int = 16,
        *,
        labels: Sequence[int] | np.ndarray | None = None,
        seed: int = 0,
        guidance: float | None = None,
        solver: str | None = None,
        steps: int | None = None,
        batch_size: int | None = None,
        trajectory: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> Samples:
        """Draws samples.

        Args:
            num: how many.
            labels: cycled up to `num`; None takes all classes in turn.
            seed: same seed, same samples, whatever the batch size.
            guidance: 1 samples the conditional model itself.
            solver: a name in `solvers.SOLVERS`.
            steps: steps of the time grid.
            batch_size: samples a batch; the last batch is padded, so one shape is compiled.
            trajectory: also return the state after every step.
            progress: called with the number of samples done.

        Raises:
            ConfigError: a label out of range, labels or guidance for an unconditional model,
                guidance for one that never trained without labels, an unknown solver, or a count
                that is not positive.
        """
        given = {"guidance": guidance, "solver": solver, "steps": steps, "batch_size": batch_size}
        given = {name: value for name, value in given.items() if value is not None}
        options = dataclasses.replace(self.defaults, **given)
        self.check(num, options, seed=seed)
        all_labels = self._labels(num, labels)
        size = self._batch_shape(num, options.batch_size)
        compiled = self._compiled(_Static.of(options), trajectory)
        parts = []
        for start in range(0, num, size):
            index = np.minimum(np.arange(start, start + size), num - 1)
            conditioning = {} if all_labels is None else {"label": all_labels[index]}
            inputs = self._place((index.astype(np.uint32), conditioning))
            with jax.set_mesh(self.mesh):
                states = compiled(
                    self.params, jnp.uint32(seed), *inputs, jnp.float32(options.guidance)
                )
            parts.append(gather(states)[:, : num - start])
            if progress is not None:
                progress(min(start + size, num))
        states = self._finish(np.concatenate(parts, axis=1))
        return Samples(x=states[-1], label=all_labels, trajectory=states if trajectory else None)

    def check(self, num: int = 1, options: SamplingOptions | None = None, *, seed: int = 0) -> None:
        """Raises ConfigError where these options (default: the pipeline's own) cannot work."""
        options = options or self.defaults
        for name, value in (
            ("num", num),
            ("steps", options.steps),
            ("batch_size", options.batch_size),
        ):
            if value < 1:
                raise ConfigError(f"{name}={value}: expected at least 1")
        if not 0 <= seed < 2**32:
            raise ConfigError(f"seed={seed}: expected 0 <= seed < 2**32")
        if not math.isfinite(options.guidance):
            raise ConfigError(f"guidance={options.guidance}: expected a finite number")
        if options.guidance != 1.0 and not self.conditional:
            raise ConfigError(
                f"guidance={options.guidance}: the model is unconditional; expected 1"
            )
        if options.guidance != 1.0 and not self.guidable:
            raise ConfigError(
                f"guidance={options.guidance}: the model was trained with label_dropout=0 and has "
                "no prediction without labels; expected 1"
            )
        low, high = options.interval
        if not 0.0 <= low < high <= 1.0:
            raise ConfigError(
                f"guidance_interval={options.interval}: expected times 0 <= low < high <= 1"
            )
        if not 0.0 <= options.rescale <= 1.0:
            raise ConfigError(f"guidance_rescale={options.rescale}: expected 0..1")
        if self.schedule is None and options.solver != "ancestral":
            raise ConfigError(
                f"solver={options.solver!r}: this process has no ODE; expected 'ancestral'"
            )
        if options.solver != "ancestral":
            _solver(options.solver)
        with _one_line():
            self.times(options.steps)

    def trace(self) -> None:
        """Walks through the sampler without computing, for what only its parts can judge.

        Parameters may be shapes only.

        Raises:
            ConfigError: an option of the solver, the guidance or the threshold cannot work.
        """
        self.check()
        batch = batch_shards(self.mesh)
        index = jax.ShapeDtypeStruct((batch,), jnp.uint32)
        label = {"label": jax.ShapeDtypeStruct((batch,), jnp.int32)} if self.conditional else {}
        scalar = jax.ShapeDtypeStruct((), jnp.float32)
        seed = jax.ShapeDtypeStruct((), jnp.uint32)
        run = functools.partial(self._run, _Static.of(self.defaults), False)
        with _one_line(), jax.set_mesh(self.mesh):
            jax.eval_shape(run, self.params, seed, index, label, scalar)

    def _labels(self, num: int, labels: Any) -> np.ndarray | None:
        if not self.conditional:
            if labels is not None and len(labels):
                raise ConfigError(f"labels={list(labels)}: the model is unconditional; leave them")
            return None
        if labels is None or not len(labels):
            labels = np.arange(self.spec.num_classes)
        labels = np.asarray(labels)
        if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
            raise ConfigError(f"labels={labels.tolist()!r}: expected a list of whole numbers")
        bad = (labels < 0) | (labels >= self.spec.num_classes)
        if bad.any():
            raise ConfigError(
                f"labels={labels[bad][0]}: out of range; expected 0..{self.spec.num_classes - 1}"
            )
        return np.resize(labels.astype(np.int32), num)

    def _batch_shape(self, num: int, batch_size: int) -> int:
        """The batch size, no larger than needed, rounded up to fill the devices."""
        devices = batch_shards(self.mesh)
        return -(-min(num, batch_size) // devices) * devices

    def _place(self, tree: PyTree) -> PyTree:
        sharding = batch_sharding(self.mesh)
        return jax.tree.map(
            lambda a: jax.make_array_from_callback(a.shape, sharding, lambda i, a=a: a[i]), tree
        )

    def _finish(self, states: np.ndarray) -> np.ndarray:
        if self.spec.kind == "image":
            return to_uint8(states)
        return np.round(states).astype(np.uint8) if self.spec.kind == "bits" else states

    def with_params(self, params: PyTree) -> PixelPipeline:
        """The same sampler with other parameters of the same shapes; compiles nothing again."""
        other = dataclasses.replace(self, params=params)
        other.__dict__["_programs"] = self._programs
        return other

    @functools.cached_property
    def _programs(self) -> dict[Any, Callable[..., Any]]:
        return {}

    def _compiled(self, static: _Static, trajectory: bool) -> Callable[..., Any]:
        """One program per static choice; guidance, seed and labels are arguments of it."""
        programs = self._programs
        if (static, trajectory) not in programs:
            run = functools.partial(self._run, static, trajectory)
            programs[static, trajectory] = jax.jit(run, compiler_options=compiler_options())
        return programs[static, trajectory]

    def _run(
        self,
        static: _Static,
        trajectory: bool,
        params: PyTree,
        seed: Any,
        index: UInt32[Array, " batch"],
        conditioning: Mapping[str, Array],
        guidance: Any,
    ) -> Float[Array, "states batch *shape"]:
        root = jax.random.fold_in(jax.random.key(seed), SAMPLING_STREAM)
        keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(root, i)))(index)
        x = jax.vmap(lambda k: self.process.prior(self.spec.shape).sample(k))(keys[:, 0])
        denoise = self._guided(static, params, conditioning, guidance)
        result = self._solve(static, denoise, x, keys[:, 1], trajectory)
        return result[1] if trajectory else result[None]

    def _solve(
        self, static: _Static, denoise: Denoiser, x: Array, keys: Key[Array, " b"], trajectory: bool
    ) -> Any:
        times = self.times(static.options.steps)
        if static.options.solver == "ancestral":
            return solvers.ancestral(
                denoise, self.process, times, x, key=keys, trajectory=trajectory
            )
        name = static.options.solver
        extra = static.options.solver_options.get(name, {})
        return _solver(name)(
            denoise, self.schedule, times, x, key=keys, trajectory=trajectory, **extra
        )

    def _guided(
        self, static: _Static, params: PyTree, conditioning: Mapping[str, Array], guidance: Any
    ) -> Denoiser:
        options = static.options
        denoise = self.denoiser(params, conditioning)
        if self.conditional and static.guided:
            denoise = guide.classifier_free(
                denoise,
                self.denoiser(params, {}),
                guidance,
                interval=options.interval,
                rescale=options.rescale,
            )
        if options.threshold == "static":
            denoise = thresholding.clip_x0(denoise, *self.spec.range)
        elif options.threshold == "dynamic":
            denoise = thresholding.dynamic_threshold(denoise, options.percentile)
        return denoise


class _Static:
    """Options that shape the program, hashable; the value of the guidance does not."""

    def __init__(self, options: SamplingOptions) -> None:
        self.options = options
        self.guided = options.guidance != 1.0
        fixed = dataclasses.replace(options, guidance=1.0, batch_size=1)
        self._identity = (repr(fixed), self.guided)

    @classmethod
    def of(cls, options: SamplingOptions) -> _Static:
        return cls(options)

    def __hash__(self) -> int:
        return hash(self._identity)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and self._identity == other._identity


def _solver(name: str) -> Callable[..., Any]:
    with _one_line():
        return solvers.get(name)


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from None
