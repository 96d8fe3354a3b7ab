"""-log p of a trained model on data, in bits per dimension, with its standard error.

Three methods (`diffusion.likelihood`):

    continuous  the bound in continuous time, of Gaussian processes; an image's last step is over
                the values that a pixel may have
    discrete    the bound over the steps of a grid, of any process; an image's last step as above
    flow        the probability-flow ODE of Gaussian processes

The last tells a density, as does the bound of kernels that learned their own last step: there
images are dequantised, by uniform noise in the cell of each value, which makes a bound on the
probability of it (of "flow" tighter by more draws of the noise).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.diffusion import likelihood, time_grids
from diffusion_jax.diffusion.denoiser import Denoiser
from diffusion_jax.diffusion.learned_betas import LearnedBetas
from diffusion_jax.diffusion.likelihood import Estimate
from diffusion_jax.diffusion.processes import LearnedGaussian, with_kernels
from diffusion_jax.diffusion.schedules import Learned, Table
from diffusion_jax.diffusion.solvers.stepping import example_keys
from diffusion_jax.errors import ConfigError, unknown_name
from diffusion_jax.evaluation.bound import BOUND_STREAM
from diffusion_jax.evaluation.pixel_levels import check_grid, check_levels, off_grid
from diffusion_jax.networks import compiler_options
from diffusion_jax.parallel.arrays import gather

PyTree = Any
METHODS = ("continuous", "discrete", "flow")
CLEAN_SHARE = 1.0 / 6.0
"""Noise at which pixels are decoded, unless the schedule says: a share of the step between their
values (logsnr 13.3 of 256 values, as in Kingma et al. 2021)."""
CLEAN_LOGSNR = 13.3
"""Where other data are, nats."""
TERMS = ("prior", "steps", "diffusion", "reconstruction")
"""Of a bound, in the order of its sum."""
_READ_BY = {
    "steps": ("discrete", "flow"),
    "draws": ("continuous", "flow"),
    "proposal": ("continuous",),
    "spread": ("continuous",),
    "trace": ("flow",),
    "probes": ("flow",),
    "solver": ("flow",),
}
"""Which methods read an option that not all do."""
NOISY_LOGSNR = -12.0
"""Where equal steps in logsnr begin for a schedule with alpha(1) = 0; one more step leads there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LikelihoodOptions:
    """How the likelihood is estimated.

    Attributes:
        method: "continuous", "discrete" or "flow".
        steps: of "discrete", equal in t, and "flow", equal in logsnr.
        draws: noise levels an example ("continuous"), draws of the dequantising noise ("flow").
        first_time: where the data stand in "continuous" and "flow", and images in "discrete"; None
            for that of a learned schedule or a table, and of others where the noise is a sixth of
            a pixel's step.
        levels: values of a pixel, in equal steps over the range of the data; None finds them in
            the data, 0 takes images for a density.
        proposal, spread: of "continuous": see `diffusion.likelihood.continuous`.
        trace, probes, solver: of "flow": see `diffusion.likelihood.flow`.
        seed: of all draws.
    """

    # Typed Any: what a user gives is judged below.
    method: Any = "continuous"
    steps: Any = 100
    draws: Any = 1
    first_time: Any = None
    levels: Any = None
    proposal: Any = "gaussian"
    spread: Any = "stratified"
    trace: Any = "rademacher"
    probes: Any = 1
    solver: Any = "rk4"
    seed: Any = 0

    def __post_init__(self) -> None:
        known = {
            "method": METHODS,
            "proposal": likelihood.PROPOSALS,
            "spread": likelihood.SPREADS,
            "trace": likelihood.TRACES,
            "solver": likelihood.FLOW_METHODS,
        }
        for name, names in known.items():
            if getattr(self, name) not in tuple(names):
                raise ConfigError(unknown_name(name, getattr(self, name), names))
        for name in ("steps", "draws", "probes"):
            if not _is_whole(getattr(self, name)) or getattr(self, name) < 1:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r}: expected a whole number, at least 1"
                )
        if not _is_whole(self.seed) or not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed={self.seed!r}: expected a whole number, 0 <= seed < 2**32")
        check_levels(self.levels)
        first = self.first_time
        if first is not None and not (isinstance(first, int | float) and 0.0 < first < 1.0):
            raise ConfigError(f"first_time={first!r}: expected a time between 0 and 1")
        for field in dataclasses.fields(self):
            readers, value = _READ_BY.get(field.name, METHODS), getattr(self, field.name)
            if self.method not in readers and value != field.default:
                raise ConfigError(
                    f"{field.name}={value!r}: not read by the method {self.method!r}; leave it, or "
                    f"choose {' or '.join(map(repr, readers))}"
                )
        if self.trace == "exact" and self.probes > 1:
            raise ConfigError(f"probes={self.probes}: an exact trace draws none; expected 1")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


class Likelihood(NamedTuple):
    """What was found, each number a mean over examples with its standard error.

    Attributes:
        bits_per_dim: -log2 p an element of an example.
        bits: -log2 p an example.
        terms: of a bound: prior, steps or diffusion and reconstruction; bits per dimension.
        levels: values that a pixel has; 0 where p is a density.
        method: that was used.
    """

    bits_per_dim: Estimate
    bits: Estimate
    terms: dict[str, Estimate]
    levels: int
    method: str

    def __str__(self) -> str:
        """A line of the whole in bits per dimension, and one for each term of a bound."""
        of = f"one of {self.levels} values" if self.levels else "density"
        head = f"{self.method}, {self.bits_per_dim.n} examples"
        rows = {f"bits/dim ({head}; {of})": self.bits_per_dim, "bits/example": self.bits}
        rows |= {f"  {name}, bits/dim": term for name, term in self.terms.items()}
        return "\n".join(
            f"{found.value:.4f} +- {found.standard_error:.4f} {name}"
            for name, found in rows.items()
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LikelihoodEvaluator:
    """Estimates -log p of batches.

    Attributes:
        denoiser: `(params, conditioning) -> Denoiser`.
        process_of: `params -> process`.
        spec: of the data: shape, kind and range.
        conditions: names of the conditioning that the network reads; p is given these.
        sigma_data: about the standard deviation of the data, for the proposal "gaussian".
        options: how.
        levels: values of a pixel; 0 takes the data for a density, see `levels_of`.
        mesh: on which the batches lie.
    """

    denoiser: Callable[[PyTree, Mapping[str, Any]], Denoiser]
    process_of: Callable[[PyTree], Any]
    spec: Any
    conditions: tuple[str, ...]
    options: LikelihoodOptions
    levels: int
    mesh: Any
    sigma_data: float = 0.5

    def __call__(self, params: PyTree, batches: Iterable[Mapping[str, Any]]) -> Likelihood:
        """Over all real examples of padded batches on the mesh.

        Raises:
            ConfigError: the method cannot do this process or these data.
        """
        process = self._host_process(params)
        found: dict[str, list[np.ndarray]] = {}
        nats_of = functools.partial(self._nats, process)
        program = jax.jit(nats_of, compiler_options=compiler_options())
        for number, batch in enumerate(batches):
            with jax.set_mesh(self.mesh):
                nats, furthest = gather(program(params, batch, jnp.uint32(number)))
            real = gather(batch["mask"])
            if self.levels:
                check_grid(furthest[real], self.levels, self.options.levels)
            for name, values in nats.items():
                found.setdefault(name, []).append(values[real])
        if not found:
            raise ConfigError("no examples: expected at least one")
        return self._result({name: np.concatenate(parts) for name, parts in found.items()})

    def _result(self, nats: Mapping[str, np.ndarray]) -> Likelihood:
        dimensions = math.prod(self.spec.shape)
        terms = {
            name: likelihood.bits_per_dim(likelihood.estimate(values), dimensions)
            for name, values in nats.items()
        }
        whole = terms.pop("total")
        terms = {name: terms[name] for name in TERMS if name in terms}
        return Likelihood(
            bits_per_dim=whole,
            bits=whole.scaled(dimensions),
            terms=terms,
            levels=self.levels,
            method=self.options.method,
        )

    def _host_process(self, params: PyTree) -> Any:
        """The process as constants: a learned schedule is one by now."""
        process = self.process_of(params)
        schedule = getattr(process, "schedule", None)
        if schedule is None and self.options.method != "discrete":
            raise ConfigError(
                f"method={self.options.method!r}: this process is not Gaussian; expected 'discrete'"
            )
        if not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(schedule)):
            return process
        constant = jax.tree.map(lambda a: np.asarray(a, np.float64), schedule)
        return dataclasses.replace(process, schedule=constant)

    def _nats(self, process: Any, params: PyTree, batch: Any, number: Any) -> Any:
        """-log p [batch] as `total`, and the terms of a bound; how far pixels are off their values,
        found here so that all processes hear of it."""
        x0, options = batch["x"], self.options
        root = jax.random.fold_in(jax.random.key(options.seed), BOUND_STREAM)
        index = number * len(x0) + jnp.arange(len(x0))
        keys = jax.vmap(lambda i: jax.random.fold_in(root, i))(index)
        given = batch.get("conditioning", {})
        denoise = self.denoiser(params, {name: given[name] for name in self.conditions})
        method: Any = {
            "continuous": self._continuous,
            "discrete": self._discrete,
            "flow": self._flow,
        }[options.method]
        axes = tuple(range(1, x0.ndim))
        furthest = off_grid(x0, self.levels, self.spec.range, axes) if self.levels else ()
        return method(denoise, process, x0, keys, self.levels), furthest

    def _continuous(self, denoise: Denoiser, process: Any, x0: Any, keys: Any, levels: int) -> Any:
        options = self.options
        decoder = likelihood.Pixels(levels, *self.spec.range) if levels else likelihood.Density()
        bound = likelihood.continuous_bound(
            denoise,
            process.schedule,
            x0,
            key=keys,
            first_time=self._first_time(process.schedule, levels),
            draws=options.draws,
            spread=options.spread,
            proposal=options.proposal,
            sigma_data=self.sigma_data,
            decoder=decoder,
        )
        parts = bound._replace(diffusion=bound.diffusion.mean(0))._asdict()
        return {"total": bound.total, **parts}

    def _discrete(self, denoise: Denoiser, process: Any, x0: Any, keys: Any, levels: int) -> Any:
        if levels and not isinstance(process, LearnedGaussian):
            return self._discrete_pixels(denoise, process, x0, keys, levels)
        if self.options.first_time is not None:
            raise ConfigError(
                f"first_time={self.options.first_time}: 'discrete' begins at 0 where the data have "
                "no pixels or the kernels learned their last step; leave it"
            )
        pairs = jax.vmap(jax.random.split)(keys)
        offset = 0.0
        if levels:
            width = likelihood.bin_width(levels, *self.spec.range)
            x0 = likelihood.dequantise(x0, pairs[:, 0], width)
            offset = -math.prod(self.spec.shape) * math.log(width)
        times = time_grids.uniform(self.options.steps)
        process, asked = with_kernels(process, denoise)
        bound = likelihood.variational_bound(asked, process, times, x0, key=pairs[:, 1])
        last = bound.steps[-1] + offset
        return {
            "total": bound.total + offset,
            "prior": bound.prior,
            "steps": bound.steps[:-1].sum(0),
            "reconstruction": last,
        }

    def _discrete_pixels(
        self, denoise: Denoiser, process: Any, x0: Any, keys: Any, levels: int
    ) -> Any:
        """Of values themselves: down to the first time, where they are decoded from the state. A
        density at t = 0 would ask the network for what it never saw, the noise in the cells."""
        schedule, first = process.schedule, self._first_time(process.schedule, levels)
        pairs = jax.vmap(jax.random.split)(keys)
        times = time_grids.uniform(self.options.steps, 1.0, first)
        process, asked = with_kernels(process, denoise)
        bound = likelihood.variational_bound(asked, process, times, x0, key=pairs[:, 1])
        noise = jax.vmap(lambda k, x: jax.random.normal(k, x.shape, x.dtype))(pairs[:, 0], x0)
        ends = float(schedule.alpha(first)), float(schedule.sigma(first))
        nats = likelihood.Pixels(levels, *self.spec.range)(x0, noise, *ends)
        last = nats.reshape(len(x0), -1).sum(1)
        return {
            "total": bound.total + last,
            "prior": bound.prior,
            "steps": bound.steps.sum(0),
            "reconstruction": last,
        }

    def _flow(self, denoise: Denoiser, process: Any, x0: Any, keys: Any, levels: int) -> Any:
        options, schedule = self.options, process.schedule
        times = self._flow_times(schedule, levels)
        scale = float(schedule.alpha(times[-1]))

        def log_density(x: Any, keys: Any) -> Any:
            # The state at the first time, its noise being far below what the data resolve.
            found = likelihood.flow_log_density(
                denoise,
                schedule,
                times,
                scale * x,
                key=keys,
                trace=options.trace,
                probes=options.probes,
                method=options.solver,
            ).log_density
            return found + math.prod(self.spec.shape) * math.log(scale)

        if not levels:
            if options.draws > 1:
                raise ConfigError(
                    f"draws={options.draws}: 'flow' draws what dequantises pixels, and these data "
                    "have a density; expected 1"
                )
            return {"total": -log_density(x0, example_keys(keys, len(x0)))}
        width = likelihood.bin_width(levels, *self.spec.range)
        log_p = likelihood.dequantised_log_probability(
            log_density, x0, key=keys, width=width, draws=options.draws
        )
        return {"total": -log_p}

    def _first_time(self, schedule: Any, levels: int) -> float:
        if self.options.first_time is not None:
            return self.options.first_time
        if isinstance(schedule, Learned):
            return schedule.t_min
        if isinstance(schedule, Table | LearnedBetas):
            return 1.0 / schedule.num_steps
        if not levels:
            return float(schedule.t_from_logsnr(CLEAN_LOGSNR))
        noise = CLEAN_SHARE * likelihood.bin_width(levels, *self.spec.range)
        return float(schedule.t_from_logsnr(-2.0 * math.log(noise)))

    def _flow_times(self, schedule: Any, levels: int) -> np.ndarray:
        first = self._first_time(schedule, levels)
        if schedule.alpha(1.0) > 0.0:
            return time_grids.uniform_logsnr(schedule, self.options.steps, 1.0, first)
        top = float(schedule.t_from_logsnr(NOISY_LOGSNR))
        inner = time_grids.uniform_logsnr(schedule, max(self.options.steps - 1, 1), top, first)
        return np.concatenate([[1.0], inner])
