"""-log p of a trained model on data, in bits per dimension, with its standard error.

Three methods (`diffusion.likelihood`):

    continuous  the bound in continuous time, of Gaussian processes; an image's last step is over
                the values that a pixel may have
    discrete    the bound over the steps of a grid, of any process; an image's last step as above
    flow        the probability-flow ODE of Gaussian processes

The last tells a density, as does the bound of kernels that learned their own last step: there
images are dequantised, by uniform noise in the cell of each value, which makes a bound on the
probability of it. More draws of the noise make that of "flow" tighter where its trace is exact; an
estimated one, unbiased in log p, would be biased in the mean of p over the draws.
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
from diffusion_jax.diffusion.processes import (
    Gaussian,
    LearnedGaussian,
    LearnedKeep,
    with_kernels,
)
from diffusion_jax.diffusion.schedules import Learned, Table
from diffusion_jax.diffusion.solvers.stepping import example_keys
from diffusion_jax.errors import ConfigError
from diffusion_jax.evaluation.options import STEPS, LikelihoodOptions
from diffusion_jax.evaluation.pixel_levels import check_grid, off_grid
from diffusion_jax.evaluation.shared import batch_keys, filled, on_host
from diffusion_jax.networks import compiler_options
from diffusion_jax.parallel.arrays import gather

PyTree = Any
CLEAN_SHARE = 1.0 / 6.0
"""Noise at which pixels are decoded, unless the schedule says: a share of the step between their
values (logsnr 13.3 of 256 values, as in Kingma et al. 2021)."""
CLEAN_LOGSNR = 13.3
"""Where other data are, nats."""
TERMS = ("prior", "steps", "diffusion", "reconstruction")
"""Of a bound, in the order of its sum."""
NOISY_LOGSNR = -12.0
"""Where equal steps in logsnr begin for a schedule with alpha(1) = 0; one more step leads there."""


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
            ConfigError: the method cannot do this process or these data, or some examples have no
                finite value.
        """
        process = self._process(params)
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
        self._check_finite(nats["total"])
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

    def _check_finite(self, nats: np.ndarray) -> None:
        bad = int((~np.isfinite(nats)).sum())
        if not bad:
            return
        options, mend = self.options, "other weights (ema=...), or values as it was trained on"
        if options.solver == "dopri5":
            mend = f"rtol, atol above {options.rtol:g}, {options.atol:g}, solver='rk4', or {mend}"
        raise ConfigError(
            f"method={options.method!r}: {bad} of {len(nats)} examples have a likelihood that is "
            f"not finite; expected {mend}"
        )

    def _process(self, params: PyTree) -> Any:
        """The process as constants: what was learned of it is known by now."""
        process = self.process_of(params)
        if self.options.method != "discrete" and not isinstance(process, Gaussian):
            raise ConfigError(
                f"method={self.options.method!r}: this process is not Gaussian; expected 'discrete'"
            )
        return on_host(process)

    def _nats(self, process: Any, params: PyTree, batch: Any, number: Any) -> Any:
        """-log p [batch] as `total`, and the terms of a bound; how far pixels are off their values,
        found here so that all processes hear of it."""
        x0, options = batch["x"], self.options
        keys = batch_keys(options.seed, number, len(x0))
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
            x0, offset = filled(x0, pairs[:, 0], likelihood.bin_width(levels, *self.spec.range))
        times = time_grids.uniform(self._steps(process))
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
        steps, pairs = self._steps(process), jax.vmap(jax.random.split)(keys)
        if not isinstance(schedule, LearnedBetas):
            times = time_grids.uniform(steps, 1.0, first)
        else:
            if self.options.first_time is not None:
                raise ConfigError(
                    f"first_time={first}: the first of the learned steps decodes pixels; leave it"
                )
            times = time_grids.uniform(steps)[:-1]
        process, asked = with_kernels(process, denoise)
        bound = likelihood.variational_bound(asked, process, times, x0, key=pairs[:, 1])
        noise = jax.vmap(lambda k, x: jax.random.normal(k, x.shape, x.dtype))(pairs[:, 0], x0)
        ends = float(schedule.alpha(first)), float(schedule.sigma(first))
        nats = likelihood.Pixels(levels, *self.spec.range)(x0, noise, *ends)
        last = likelihood.sum_elements(nats)
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
                rtol=options.rtol,
                atol=options.atol,
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

    def _steps(self, process: Any) -> int:
        """Of "discrete": those asked for, or else those that were learned."""
        learned, asked = None, self.options.steps
        if isinstance(getattr(process, "schedule", None), LearnedBetas):
            learned = process.schedule.num_steps
        elif isinstance(getattr(process, "keep", None), LearnedKeep):
            learned = len(process.keep.logits)
        elif isinstance(process, LearnedGaussian) and asked is None:
            raise ConfigError(
                "steps=None: learned variances belong to the steps that they learned by; expected "
                "config.objective.variational.num_steps of the run"
            )
        if learned is not None and asked not in (None, learned):
            raise ConfigError(
                f"steps={asked}: the schedule has learned {learned} steps, and its bound is over "
                f"these; leave it"
            )
        return asked or learned or STEPS

    def _flow_times(self, schedule: Any, levels: int) -> np.ndarray:
        first, steps = self._first_time(schedule, levels), self.options.steps or STEPS
        ends = schedule.alpha(1.0) > 0.0
        top = 1.0 if ends else float(schedule.t_from_logsnr(NOISY_LOGSNR))
        if not first < top:
            raise ConfigError(
                f"first_time={first:g}: 'flow' takes equal steps in logsnr below t={top:.6g}; "
                "expected an earlier time"
            )
        if self.options.solver == "dopri5":
            return np.array([1.0, first])
        if ends:
            return time_grids.uniform_logsnr(schedule, steps, 1.0, first)
        if steps == 1:
            raise ConfigError(
                "steps=1: with alpha(1) = 0 one step leads to where equal steps in logsnr begin; "
                "expected at least 2"
            )
        inner = time_grids.uniform_logsnr(schedule, steps - 1, top, first)
        return np.concatenate([[1.0], inner])
