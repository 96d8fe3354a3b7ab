"""From trained parameters to data, for models that live in the space of their data.

A sample depends on the seed and its index alone: starting noise and every draw of a solver come
from `fold_in(seed, index)`, so that the number of samples, the batch size and the mesh change
nothing beyond rounding.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Key, Shaped, UInt32

from diffusion_jax.data.spec import DataSpec
from diffusion_jax.data.text import decode
from diffusion_jax.diffusion import solvers
from diffusion_jax.diffusion.denoiser import Denoised, Denoiser, as_denoiser
from diffusion_jax.diffusion.processes import LearnedGaussian, with_kernels
from diffusion_jax.errors import ConfigError, named
from diffusion_jax.networks import compiler_options
from diffusion_jax.parallel.arrays import gather
from diffusion_jax.parallel.mesh import batch_sharding, batch_shards
from diffusion_jax.pipelines import guiding
from diffusion_jax.pipelines.conditioning import Asked, Conditions
from diffusion_jax.pipelines.guided import guided
from diffusion_jax.pipelines.options import Program, SamplingOptions, check_solver_options, whole
from diffusion_jax.pipelines.samples import Samples
from diffusion_jax.visual.pixels import to_uint8

PyTree = Any
Labels = Sequence[int | str] | np.ndarray | Array | None
Rows = Sequence[Sequence[float]] | np.ndarray | Array | None
SAMPLING_STREAM = 4
"""Folded into the seed: training, validation and bounds use other numbers (`training.step`)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PixelPipeline:
    """A trained model that samples.

    Attributes:
        params: parameters, placed on `mesh`.
        denoiser: `(params, conditioning) -> Denoiser`, the network bound to its process.
        process: the forward process, for the prior and ancestral sampling.
        schedule: its schedule, None where ODE solvers do not apply.
        spec: shape and kind of the data; labels condition the model where it has classes.
        conditions: names of the conditioning that the network reads: label, text, scalar.
        always: those of them that training never left out: there is no prediction without.
        times: `steps -> decreasing times from 1 to 0`.
        mesh: where to compute.
        defaults: options that a call may override.
        weak: the weaker model of autoguidance, where there is one.
        perturbed: `denoiser` of the network without its self-attention maps; None without any.
        process_of: `params -> process`, where they decide it: a learned schedule. Then `process`
            and `schedule` are those that a run begins with.
        sigma_data: what the training took for the standard deviation of the data.
    """

    params: PyTree
    denoiser: Callable[[PyTree, Mapping[str, Any]], Denoiser]
    process: Any
    schedule: Any
    spec: DataSpec
    conditions: tuple[str, ...]
    times: Callable[[int], np.ndarray]
    mesh: Mesh
    defaults: SamplingOptions
    always: tuple[str, ...] = ()
    weak: guiding.Weak | None = None
    perturbed: Callable[[PyTree, Mapping[str, Any]], Denoiser] | None = None
    process_of: Callable[[PyTree], Any] | None = None
    sigma_data: float = 0.5

    def sample(
        self,
        num: int = 16,
        *,
        labels: Labels = None,
        prompts: str | Sequence[str] | None = None,
        scalars: Rows = None,
        negative_labels: Labels = None,
        negative_prompts: str | Sequence[str] | None = None,
        negative_scalars: Rows = None,
        also_labels: Labels = None,
        also_prompts: str | Sequence[str] | None = None,
        also_scalars: Rows = None,
        also_guidance: Sequence[float] | np.ndarray | Array | None = None,
        seed: int = 0,
        trajectory: bool = False,
        progress: Callable[[int], None] | None = None,
        **options: Any,
    ) -> Samples:
        """Draws samples.

        Args:
            num: how many.
            labels: numbers or names of classes, cycled up to `num`; None takes all in turn.
            prompts: captions, cycled up to `num`; None samples without.
            scalars: rows of the numbers that condition the model, cycled; None samples without.
            negative_labels, negative_prompts, negative_scalars: in place of the unconditional
                branch, cycled: what guidance turns away from.
            also_labels, also_prompts, also_scalars: further conditions, each of all samples, that
                are composed with the first (Liu et al. 2022).
            also_guidance: their weights, below 0 for what is to be absent; `guidance` by default.
            seed: same seed, same samples, whatever the batch size.
            trajectory: also return the state after every step.
            progress: called with the number of samples done.
            **options: fields of `SamplingOptions` (guidance, solver, steps, batch_size, ...); None
                or absent takes the pipeline's own. `solver_options` are those of the solver.

        Raises:
            ConfigError: an unknown option or a value out of its range, a label out of range, labels
                or guidance for an unconditional model, or guidance for one that never trained
                without labels.
        """
        conditions = {
            "given": (labels, prompts, scalars),
            "negative": (negative_labels, negative_prompts, negative_scalars),
            "also": (also_labels, also_prompts, also_scalars),
            "also_guidance": also_guidance,
        }
        parts = []
        asked, batches = self._asked(num, seed, conditions, options, trajectory)
        for _, states in batches:
            parts.append(states)
            if progress is not None:
                progress(sum(part.shape[1] for part in parts))
        return self._samples(np.concatenate(parts, axis=1), asked.given, trajectory)

    def stream(self, num: int, *, seed: int = 0, **arguments: Any) -> Iterator[Samples]:
        """The same samples as `sample`, a batch at a time: memory does not grow with `num`.

        The next batch is under way while one is being used. Arguments are those of `sample`, but
        for `trajectory` and `progress`; they are judged before this returns.
        """
        fields = ("labels", "prompts", "scalars")
        conditions: dict[str, Any] = {
            branch: tuple(arguments.pop(f"{prefix}{field}", None) for field in fields)
            for branch, prefix in (("given", ""), ("negative", "negative_"), ("also", "also_"))
        }
        conditions["also_guidance"] = arguments.pop("also_guidance", None)
        asked, batches = self._asked(num, seed, conditions, arguments, False)
        return (
            self._samples(states, {k: v[rows] for k, v in asked.given.items()}, False)
            for rows, states in batches
        )

    def _asked(
        self, num: Any, seed: Any, conditions: Any, options: Mapping[str, Any], trajectory: bool
    ) -> tuple[Asked, Iterator[tuple[slice, np.ndarray]]]:
        """What is asked for, all of it judged, and its batches."""
        num, seed = whole("num", num, low=1), whole("seed", seed, low=0, below=2**32)
        asked = self._conditions.read(num, **conditions)
        negative = asked.negative is not None
        chosen = self.options(negative=negative, **options)
        guiding.check_extra(chosen, self._model, negative=negative, also=len(asked.also))
        guiding.check_given(options, chosen)
        return asked, self._batches(num, asked, chosen, seed, trajectory)

    def _batches(
        self, num: int, asked: Asked, options: SamplingOptions, seed: int, trajectory: bool
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """States [states, n, *shape] of the samples in a slice, of what has been checked."""
        size = self._batch_shape(num, options.batch_size)
        compiled = self._compiled(Program(options), trajectory)
        numbers = _weights(options.guidance, asked)
        waiting = None
        for start in range(0, num, size):
            index = np.minimum(np.arange(start, start + size), num - 1)
            inputs = self._place((index.astype(np.uint32), asked.branches(index)))
            with jax.set_mesh(self.mesh):
                states = compiled(self._trees, jnp.uint32(seed), *inputs, numbers)
            rows = slice(start, min(start + size, num))
            if waiting is not None:
                yield waiting[0], _numpy(*waiting)
            waiting = rows, states
        if waiting is not None:
            yield waiting[0], _numpy(*waiting)

    def _samples(
        self, states: np.ndarray, given: Mapping[str, np.ndarray], trajectory: bool
    ) -> Samples:
        last = states[-1].reshape(states.shape[1], -1)
        finite = np.isfinite(last).all(1) if np.issubdtype(last.dtype, np.floating) else None
        states = self._finish(states)
        return Samples(
            x=states[-1],
            label=given.get("label"),
            text=np.asarray(decode(given["text"])) if "text" in given else None,
            scalar=given.get("scalar"),
            trajectory=states if trajectory else None,
            finite=finite,
        )

    def options(self, *, negative: bool = False, **changes: Any) -> SamplingOptions:
        """The defaults with `changes`, checked against this model; see `SamplingOptions`.

        `negative` says whether a negative condition is given.

        Raises:
            ConfigError: an option is unknown or cannot work with this model.
        """
        options = self.defaults.replace(**changes)
        with _one_line():
            guiding.check(options, self._model, options.steps, negative=negative)
        if options.threshold != "none" and self.spec.kind != "image":
            name = options.threshold
            raise ConfigError(
                f"threshold={name!r}: {self.spec.kind} are not clipped; expected 'none'"
            )
        if self.schedule is None and options.solver != "ancestral":
            raise ConfigError(
                f"solver={options.solver!r}: this process has no ODE; expected 'ancestral'"
            )
        with _one_line():
            self.times(options.steps)
        self._check_solver(options, options.solver)
        return options

    def _check_solver(self, options: SamplingOptions, name: str) -> None:
        """Walks through the solver, with nothing in place of the network."""
        check_solver_options(name, options.solver_options.get(name, {}))
        if name == "ancestral" or self.schedule is None:
            return
        nothing = as_denoiser(
            lambda x, t: Denoised(x, variance_fraction=x if self.learns_variance else None),
            self.schedule,
        )
        x = jax.ShapeDtypeStruct((1, *self.spec.shape), jnp.float32)
        key = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
        run = functools.partial(
            self._solve, Program(dataclasses.replace(options, solver=name)), nothing
        )
        with named(f"{name}."), _one_line():
            jax.eval_shape(lambda x, key: run(x, key, False), x, key)

    def trace(self) -> None:
        """Walks through the sampler without computing, for what only its parts can judge.

        Parameters may be shapes only.

        Raises:
            ConfigError: an option of a solver, the guidance or the threshold cannot work.
        """
        options = self.options()
        for name in options.solver_options:
            self._check_solver(options, name)
        batch = batch_shards(self.mesh)
        index = jax.ShapeDtypeStruct((batch,), jnp.uint32)
        one = self._conditions.rows(1, (None, None, None), shapes_only=True)
        given = {k: jax.ShapeDtypeStruct((batch, *v.shape[1:]), v.dtype) for k, v in one.items()}
        branches = {"given": given, "negative": None, "also": []}
        numbers = {
            "guidance": jax.ShapeDtypeStruct((), jnp.float32),
            "also": jax.ShapeDtypeStruct((0,), jnp.float32),
        }
        seed = jax.ShapeDtypeStruct((), jnp.uint32)
        run = functools.partial(self._run, Program(options), False)
        with _one_line(), jax.set_mesh(self.mesh):
            jax.eval_shape(run, self._trees, seed, index, branches, numbers)

    def solve_one(self, static: Program, *, negative: bool = False, also: int = 0) -> Array:
        """Runs the sampler for one sample of the first condition, for what its parts tell; with a
        negative condition, and so many further ones."""
        one = self._conditions.rows(1, (None, None, None), shapes_only=True)
        one = jax.tree.map(jnp.asarray, one)
        branches = {"given": one, "negative": one if negative else None, "also": [one] * also}
        numbers = {"guidance": jnp.float32(static.options.guidance), "also": jnp.ones(also)}
        index = jnp.zeros(1, jnp.uint32)
        return self._run(static, False, self._trees, jnp.uint32(0), index, branches, numbers)

    @property
    def learns_variance(self) -> bool:
        """Whether the network puts out variances of the reverse kernels."""
        return isinstance(self.process, LearnedGaussian)

    @property
    def conditional(self) -> bool:
        """Whether the network reads anything besides the noise level."""
        return bool(self.conditions)

    @property
    def _trees(self) -> dict[str, PyTree]:
        """All parameters, arguments of every program."""
        return {"params": self.params, "weak": None if self.weak is None else self.weak.params}

    @property
    def _conditions(self) -> Conditions:
        return Conditions(spec=self.spec, names=self.conditions, always=self.always)

    @property
    def _model(self) -> guiding.Model:
        return guiding.Model(
            conditions=self.conditions,
            always=self.always,
            kind=self.spec.kind,
            schedule=self.schedule,
            weak=self.weak is not None,
            perturbed=self.perturbed is not None,
        )

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

    def _compiled(self, static: Program, trajectory: bool) -> Callable[..., Any]:
        """One program per static choice; guidance, seed and labels are arguments of it."""
        programs = self._programs
        if (static, trajectory) not in programs:
            run = functools.partial(self._run, static, trajectory)
            programs[static, trajectory] = jax.jit(run, compiler_options=compiler_options())
        return programs[static, trajectory]

    def _run(
        self,
        static: Program,
        trajectory: bool,
        trees: Mapping[str, PyTree],
        seed: Any,
        index: UInt32[Array, " batch"],
        conditioning: Mapping[str, Any],
        numbers: Mapping[str, Any],
    ) -> Shaped[Array, "states batch *shape"]:
        if self.process_of is not None:
            process = self.process_of(trees["params"])
            schedule = getattr(process, "schedule", None)
            found = dataclasses.replace(self, process=process, schedule=schedule, process_of=None)
            rest = (seed, index, conditioning, numbers)
            return found._run(static, trajectory, trees, *rest)
        root = jax.random.fold_in(jax.random.key(seed), SAMPLING_STREAM)
        keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(root, i)))(index)
        x = jax.vmap(lambda k: self.process.prior(self.spec.shape).sample(k))(keys[:, 0])
        denoise = guided(self, static, trees, conditioning, numbers)
        result = self._solve(static, denoise, x, keys[:, 1], trajectory)
        return result[1] if trajectory else result[None]

    def _solve(
        self, static: Program, denoise: Denoiser, x: Array, keys: Key[Array, " b"], trajectory: bool
    ) -> Any:
        times = self.times(static.options.steps)
        if static.options.solver == "ancestral":
            process, asked = with_kernels(self.process, denoise)
            return solvers.ancestral(asked, process, times, x, key=keys, trajectory=trajectory)
        name = static.options.solver
        extra = static.options.solver_options.get(name, {})
        return solvers.get(name)(
            denoise, self.schedule, times, x, key=keys, trajectory=trajectory, **extra
        )


def _numpy(rows: slice, states: Any) -> np.ndarray:
    return gather(states)[:, : rows.stop - rows.start]


def _weights(guidance: float, asked: Asked) -> dict[str, Array]:
    """The guidance and the weights of further conditions, which are its own where none is given."""
    also = np.full(len(asked.also), guidance) if asked.weights is None else asked.weights
    return {"guidance": jnp.float32(guidance), "also": jnp.asarray(also, jnp.float32)}


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error).splitlines()[0]) from error
