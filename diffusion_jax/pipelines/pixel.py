"""From trained parameters to data, for models that live in the space of their data.

A sample depends on the seed and its index alone: starting noise and every draw of a solver come
from `fold_in(seed, index)`, so that the number of samples, the batch size and the mesh change
nothing beyond rounding.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Key, Shaped, UInt32

from diffusion_jax.data.spec import DataSpec
from diffusion_jax.data.text import decode, encode
from diffusion_jax.diffusion import guidance as guide
from diffusion_jax.diffusion import solvers, thresholding
from diffusion_jax.diffusion.denoiser import Denoiser, as_denoiser
from diffusion_jax.diffusion.guidance_tokens import classifier_free_tokens
from diffusion_jax.errors import ConfigError, named, unknown_name
from diffusion_jax.networks import compiler_options
from diffusion_jax.parallel.arrays import gather
from diffusion_jax.parallel.mesh import batch_sharding, batch_shards
from diffusion_jax.pipelines.options import (
    Program,
    SamplingOptions,
    label_list,
    number_rows,
    text_list,
    whole,
)
from diffusion_jax.pipelines.samples import Samples
from diffusion_jax.visual.pixels import to_uint8

PyTree = Any
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

    def sample(
        self,
        num: int = 16,
        *,
        labels: Sequence[int] | np.ndarray | None = None,
        prompts: str | Sequence[str] | None = None,
        scalars: Sequence[Sequence[float]] | np.ndarray | None = None,
        seed: int = 0,
        trajectory: bool = False,
        progress: Callable[[int], None] | None = None,
        **options: Any,
    ) -> Samples:
        """Draws samples.

        Args:
            num: how many.
            labels: cycled up to `num`; None takes all classes in turn.
            prompts: captions, cycled up to `num`; None samples without.
            scalars: rows of the numbers that condition the model, cycled; None samples without.
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
        chosen = self.options(**options)
        num, seed = whole("num", num, low=1), whole("seed", seed, low=0, below=2**32)
        given = self._conditioning(num, labels, prompts, scalars)
        size = self._batch_shape(num, chosen.batch_size)
        compiled = self._compiled(Program(chosen), trajectory)
        parts = []
        for start in range(0, num, size):
            index = np.minimum(np.arange(start, start + size), num - 1)
            conditioning = {name: values[index] for name, values in given.items()}
            inputs = self._place((index.astype(np.uint32), conditioning))
            with jax.set_mesh(self.mesh):
                states = compiled(
                    self.params, jnp.uint32(seed), *inputs, jnp.float32(chosen.guidance)
                )
            parts.append(gather(states)[:, : num - start])
            if progress is not None:
                progress(min(start + size, num))
        states = self._finish(np.concatenate(parts, axis=1))
        return Samples(
            x=states[-1],
            label=given.get("label"),
            text=np.asarray(decode(given["text"])) if "text" in given else None,
            scalar=given.get("scalar"),
            trajectory=states if trajectory else None,
        )

    def options(self, **changes: Any) -> SamplingOptions:
        """The defaults with `changes`, checked against this model; see `SamplingOptions`.

        Raises:
            ConfigError: an option is unknown or cannot work with this model.
        """
        options = self.defaults.replace(**changes)
        self._check_guidance(options)
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

    def _check_guidance(self, options: SamplingOptions) -> None:
        neutral = (1.0, (0.0, 1.0), 0.0)
        names = ("guidance", "guidance_interval", "guidance_rescale")
        for name, value in zip(names, neutral, strict=True):
            given = getattr(options, name)
            if given != value and not self.conditional:
                raise ConfigError(f"{name}={given}: the model is unconditional; expected {value}")
        if options.guidance != 1.0 and self.always:
            names = " and ".join(f"{name}_dropout=0" for name in self.always)
            raise ConfigError(
                f"guidance={options.guidance}: the model was trained with {names} and has no "
                "prediction without; expected 1"
            )

    def _check_solver(self, options: SamplingOptions, name: str) -> None:
        """Walks through the solver, with nothing in place of the network."""
        given = options.solver_options.get(name, {})
        if name == "ancestral" and given:
            raise ConfigError(f"ancestral option {next(iter(given))!r} is unknown; it takes none")
        if name == "ancestral" or self.schedule is None:
            return
        nothing = as_denoiser(lambda x, t: x, self.schedule)
        x = jax.ShapeDtypeStruct((1, *self.spec.shape), jnp.float32)
        key = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
        run = functools.partial(
            self._solve, Program(dataclasses.replace(options, solver=name)), nothing
        )
        standard = {"key", "noise", "trajectory"}
        parameters = inspect.signature(solvers.get(name)).parameters.values()
        known = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - standard
        for option in given:
            if option not in known:
                raise ConfigError(unknown_name(f"{name} option", option, known))
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
        one = self._conditioning(1, None, None, None, shapes_only=True)
        given = {k: jax.ShapeDtypeStruct((batch, *v.shape[1:]), v.dtype) for k, v in one.items()}
        scalar = jax.ShapeDtypeStruct((), jnp.float32)
        seed = jax.ShapeDtypeStruct((), jnp.uint32)
        run = functools.partial(self._run, Program(options), False)
        with _one_line(), jax.set_mesh(self.mesh):
            jax.eval_shape(run, self.params, seed, index, given, scalar)

    @property
    def conditional(self) -> bool:
        """Whether the network reads anything besides the noise level."""
        return bool(self.conditions)

    def _conditioning(
        self, num: int, labels: Any, prompts: Any, scalars: Any, *, shapes_only: bool = False
    ) -> dict[str, np.ndarray]:
        """Conditioning [num, ...] by name; what is not given is the network's null."""
        for name, argument, value in (
            ("label", "labels", labels),
            ("text", "prompts", prompts),
            ("scalar", "scalars", scalars),
        ):
            absent = value is None or (isinstance(value, Sized) and not len(value))
            if not absent and name not in self.conditions:
                what = "unconditional" if not self.conditions else f"not conditioned by {name}"
                raise ConfigError(f"{argument}={value!r}: the model is {what}; leave them")
            if absent and name in self.always and name != "label" and not shapes_only:
                raise ConfigError(
                    f"{argument}={value!r}: the model was trained with {name}_dropout=0 and has "
                    f"no prediction without; give {argument}"
                )
        result = {}
        if "label" in self.conditions:
            given = labels is not None and (not isinstance(labels, Sized) or len(labels) > 0)
            classes = self.spec.num_classes
            result["label"] = _cycle(label_list(labels if given else range(classes), classes), num)
        if "text" in self.conditions:
            # An empty text is exactly the network's null.
            texts = text_list(prompts, self.spec.text_length)
            result["text"] = _cycle(encode(texts, self.spec.text_length), num)
        if "scalar" in self.conditions and scalars is not None:
            result["scalar"] = _cycle(number_rows(scalars, self.spec.scalars), num)
        return result

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
        params: PyTree,
        seed: Any,
        index: UInt32[Array, " batch"],
        conditioning: Mapping[str, Array],
        guidance: Any,
    ) -> Shaped[Array, "states batch *shape"]:
        root = jax.random.fold_in(jax.random.key(seed), SAMPLING_STREAM)
        keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(root, i)))(index)
        x = jax.vmap(lambda k: self.process.prior(self.spec.shape).sample(k))(keys[:, 0])
        denoise = self._guided(static, params, conditioning, guidance)
        result = self._solve(static, denoise, x, keys[:, 1], trajectory)
        return result[1] if trajectory else result[None]

    def _solve(
        self, static: Program, denoise: Denoiser, x: Array, keys: Key[Array, " b"], trajectory: bool
    ) -> Any:
        times = self.times(static.options.steps)
        if static.options.solver == "ancestral":
            return solvers.ancestral(
                denoise, self.process, times, x, key=keys, trajectory=trajectory
            )
        name = static.options.solver
        extra = static.options.solver_options.get(name, {})
        return solvers.get(name)(
            denoise, self.schedule, times, x, key=keys, trajectory=trajectory, **extra
        )

    def _guided(
        self, static: Program, params: PyTree, conditioning: Mapping[str, Array], guidance: Any
    ) -> Denoiser:
        options = static.options
        denoise = self.denoiser(params, conditioning)
        if self.conditional and static.guided:
            tokens = self.spec.kind == "tokens"
            combine = classifier_free_tokens if tokens else guide.classifier_free
            denoise = combine(
                denoise,
                self.denoiser(params, {}),
                guidance,
                interval=options.guidance_interval,
                rescale=options.guidance_rescale,
            )
        if options.threshold == "static":
            denoise = thresholding.clip_x0(denoise, *self.spec.range)
        elif options.threshold == "dynamic":
            denoise = thresholding.dynamic_threshold(denoise, options.threshold_percentile)
        return denoise


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error).splitlines()[0]) from error


def _cycle(values: np.ndarray, num: int) -> np.ndarray:
    """The rows repeated or cut to `num`."""
    return values[np.arange(num) % len(values)]
