"""From a config to plain objects: the only reader of a ConfigDict.

Everything here is built before the first compilation, so that a mistake in a config ends in one
line within seconds. Nothing below this module takes a config.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffusion_jax import config as configs
from diffusion_jax import data
from diffusion_jax.config import Config
from diffusion_jax.data import DataSpec, Source
from diffusion_jax.diffusion import (
    denoiser,
    predictions,
    processes,
    schedules,
    time_grids,
    time_sampling,
    weightings,
)
from diffusion_jax.errors import ConfigError, named, section, unknown_name
from diffusion_jax.evaluation.bound import BoundEvaluator, floor_bits
from diffusion_jax.networks import NETWORKS, Network, functional
from diffusion_jax.objectives.base import Objective
from diffusion_jax.objectives.denoising import Denoising
from diffusion_jax.objectives.variational import Variational
from diffusion_jax.parallel.mesh import make_mesh
from diffusion_jax.pipelines.pixel import PixelPipeline, SamplingOptions
from diffusion_jax.training.compiled import CompiledTrainer
from diffusion_jax.training.optimizer import adamw, warmup_schedule
from diffusion_jax.training.step import Trainer

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """The parts that training and sampling share.

    Attributes:
        network: pure functions.
        spec: the data.
        process: the noising process.
        schedule: of a Gaussian process, else None.
        prediction: what the network puts out; "logits" for the binomial process.
        sigma_data: for EDM preconditioning.
        conditional: whether the network reads labels.
    """

    network: Network
    spec: DataSpec
    process: Any
    schedule: Any
    prediction: str
    sigma_data: float
    conditional: bool

    def denoiser(self, params: PyTree, conditioning: Mapping[str, Any]) -> denoiser.Denoiser:
        """The network bound to parameters and conditioning."""

        def predict(x: Any, noise: Any) -> Any:
            return self.network.apply(params, x, noise, conditioning)

        if self.schedule is not None:
            return denoiser.from_network(
                predict,
                self.schedule,
                self.prediction,
                noise_input=self.network.noise_input,
                sigma_data=self.sigma_data,
            )

        def bits(x: Any, t: Any, carry: Any) -> tuple[denoiser.Denoised, Any]:
            x0 = jax.nn.sigmoid(predict(x, jnp.broadcast_to(t, x.shape[:1])))
            # Bits have no Gaussian noise; ancestral sampling reads x0 alone.
            return denoiser.Denoised(x0=x0, eps=jnp.zeros_like(x)), carry

        return denoiser.Denoiser(step=bits)

    def estimate(self, params: PyTree, x: Any, t: Any, conditioning: Any, key: Any) -> Any:
        """x0_hat = E[x0 | x_t] as the variational objective wants it; `key` for dropout."""
        apply = functools.partial(self.network.apply, key=key)
        keyed = dataclasses.replace(self, network=dataclasses.replace(self.network, apply=apply))
        return keyed.denoiser(params, conditioning)(x, t).x0


def source(config: Config, split: str) -> Source:
    """The examples of a split."""
    name, options = configs.component(config.data, "data")
    if name == "tfds":
        options["data_dir"] = config.data.data_dir or None
    with named("config."), section(f"data.{name}"):
        return data.load(name, split, **options)


def schedule(config: Config) -> schedules.Schedule:
    """The noise schedule of a Gaussian process."""
    field = "process.gaussian.schedule"
    name, options = configs.component(config.process.gaussian.schedule, field)
    with named(f"config.{field}.{name}: "), section(f"{field}.{name}"):
        if name == "table":
            return schedules.table(_betas(options["betas"])(options["steps"]))
        return schedules.SCHEDULES[name](**options)


def _betas(name: str) -> Callable[..., np.ndarray]:
    known = {
        "linear": schedules.linear_betas,
        "scaled_linear": schedules.scaled_linear_betas,
        "cosine": schedules.cosine_betas,
    }
    if name not in known:
        field = "config.process.gaussian.schedule.table.betas"
        raise ConfigError(unknown_name(field, name, known))
    return known[name]


def network(config: Config, spec: DataSpec) -> Network:
    """The score network for data of this shape."""
    name, options = configs.component(config.network, "network")
    if config.network.noise_input not in denoiser.NOISE_INPUTS:
        field, known = "config.network.noise_input", denoiser.NOISE_INPUTS
        raise ConfigError(unknown_name(field, config.network.noise_input, known))
    dtype = config.compute_dtype
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    options["dtype"] = jnp.dtype(dtype)
    options["noise_input"] = config.network.noise_input
    options["num_classes"] = spec.num_classes if config.network.use_labels else 0
    with named("config."), section(f"network.{name}"):
        return functional(functools.partial(NETWORKS[name], spec.shape, **options))


def model(config: Config, spec: DataSpec) -> Model:
    """Network, process and prediction, checked to fit together."""
    process_name, options = configs.component(config.process, "process")
    shared = {
        "spec": spec,
        "conditional": bool(config.network.use_labels and spec.num_classes),
    }
    if process_name == "binomial":
        _check_binomial(config, spec)
        return Model(
            network=network(config, spec),
            process=processes.Binomial(**options),
            schedule=None,
            prediction="logits",
            sigma_data=1.0,
            **shared,
        )
    if spec.kind == "bits":
        raise ConfigError(f"config.process.name={process_name!r}: bits need the process 'binomial'")
    noise_schedule = schedule(config)
    prediction = options["prediction"]
    with named("config.process.gaussian."), section("process.gaussian.prediction"):
        predictions.check_prediction(prediction, noise_schedule)
    return Model(
        network=network(config, spec),
        process=processes.Gaussian(noise_schedule),
        schedule=noise_schedule,
        prediction=prediction,
        sigma_data=options["sigma_data"],
        **shared,
    )


def _check_binomial(config: Config, spec: DataSpec) -> None:
    expected = {
        "data.name": (spec.kind == "bits", config.data.name, "data of bits, such as 'heartbeat'"),
        "objective.name": (
            config.objective.name == "variational",
            config.objective.name,
            "'variational'",
        ),
        "network.noise_input": (
            config.network.noise_input == "t",
            config.network.noise_input,
            "'t' (a binomial process has no signal-to-noise ratio)",
        ),
    }
    for field, (good, value, wanted) in expected.items():
        if not good:
            raise ConfigError(f"config.{field}={value!r}: the process 'binomial' needs {wanted}")


def objective(config: Config, built: Model) -> Objective:
    """What is minimised."""
    name, options = configs.component(config.objective, "objective")
    drop = {"label": options["label_dropout"]} if built.conditional else {}
    _check_probability(f"config.objective.{name}.label_dropout", options["label_dropout"])
    if name == "variational":
        with section("objective.variational.num_steps"):
            times = time_grids.uniform(options["num_steps"])
        return Objective(
            function=Variational(
                estimate=built.estimate, process=built.process, times=times, drop=drop
            )
        )
    return Objective(
        function=Denoising(
            apply=built.network.apply,
            noise_input=built.network.noise_input,
            schedule=built.schedule,
            prediction=built.prediction,
            sample_time=_sample_time(config, built.schedule),
            weight=_weight(config, built),
            sigma_data=built.sigma_data,
            drop=drop,
        )
    )


def _check_probability(field: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ConfigError(f"{field}={value!r}: expected a probability between 0 and 1")


def _sample_time(config: Config, noise_schedule: Any) -> Callable[[Any, Any, int], Any]:
    field = "objective.denoising.time"
    name, options = configs.component(config.objective.denoising.time, field)
    draw = functools.partial(time_sampling.TIME_SAMPLINGS[name], **options)
    with section(f"{field}.{name}"):
        draw(np.float64(0.5), noise_schedule)
    if not config.objective.denoising.time.stratified:
        return lambda u, stratum, cells: draw(u, noise_schedule)

    def stratified(u: Any, stratum: Any, cells: int) -> Any:
        return draw(time_sampling.stratified(u, stratum, cells), noise_schedule)

    return stratified


def _weight(config: Config, built: Model) -> Callable[[Any, Any], Any]:
    section_config = config.objective.denoising.weighting
    name = section_config.name
    if name not in weightings.WEIGHTINGS:
        field = "config.objective.denoising.weighting.name"
        raise ConfigError(unknown_name(field, name, weightings.WEIGHTINGS))
    options = section_config[name].to_dict() if name in section_config else {}
    return functools.partial(
        weightings.weight, name, built.prediction, sigma_data=built.sigma_data, **options
    )


def trainer(config: Config, built: Model) -> Trainer:
    """The engine's pure functions."""
    name, options = configs.component(config.optimizer, "optimizer")
    section_config = config.optimizer
    with section("optimizer"):
        rate = warmup_schedule(
            section_config.schedule,
            section_config.learning_rate,
            steps=config.steps,
            warmup_steps=section_config.warmup_steps,
            final_scale=section_config.final_scale,
        )
    optimizer = OPTIMIZERS[name](rate, clip_norm=section_config.clip_norm or None, **options)
    return Trainer(
        objective=objective(config, built),
        init_params=built.network.init,
        optimizer=optimizer,
        learning_rate=rate,
        ema_decays=config.ema.decays.to_dict(),
        ema_warmup=config.ema.warmup,
        seed=config.seed,
        accumulation=config.accumulation,
    )


OPTIMIZERS = {"adamw": adamw}


def compiled(config: Config, built: Model, on: Mesh) -> CompiledTrainer:
    """The engine on a mesh."""
    return CompiledTrainer(
        trainer(config, built), on, config.mesh.fsdp_min_size, config.deterministic
    )


def bound(
    config: Config, built: Model, examples: Source, on: Mesh
) -> tuple[BoundEvaluator, dict[str, float]]:
    """The evaluator of the variational bound; its floor in bits, where the data are enumerable."""
    times = time_grids.uniform(config.objective.variational.num_steps)
    evaluator = BoundEvaluator(
        denoiser=built.denoiser, process=built.process, times=times, seed=config.seed, mesh=on
    )
    if built.spec.kind != "bits":
        return evaluator, {}
    sequences = examples.fetch(np.arange(min(len(examples), 4096)))["x"]
    floor = floor_bits(sequences, built.process, times)
    return evaluator, {} if floor is None else {"bound_floor_bits": floor}


def mesh(config: Config) -> Mesh:
    """The device mesh over all processes."""
    sizes = config.mesh
    with named("config."):
        return make_mesh(sizes.data, sizes.fsdp, sizes.context, sizes.tensor)


def sampling_mesh(config: Config) -> Mesh:
    """The mesh of the training where it fits the devices at hand, else all of them in one axis."""
    try:
        return mesh(config)
    except ConfigError:
        return make_mesh()


def sampling_options(config: Config, built: Model) -> SamplingOptions:
    """The defaults of `sample`."""
    s = config.sampling
    return SamplingOptions(
        solver=s.solver,
        steps=s.steps,
        guidance=s.guidance,
        interval=tuple(s.guidance_interval),
        rescale=s.guidance_rescale,
        threshold=_threshold(s.threshold, built.spec.kind),
        percentile=s.threshold_percentile,
        solver_options={"ddim": s.ddim.to_dict(), "ddpm": s.ddpm.to_dict()},
        batch_size=s.batch_size,
    )


def _threshold(name: str, kind: str) -> str:
    known = ("auto", "none", "static", "dynamic")
    if name not in known:
        raise ConfigError(unknown_name("config.sampling.threshold", name, known))
    if name == "auto":
        return "static" if kind == "image" else "none"
    if name != "none" and kind != "image":
        # Bits are probabilities already; points have no range to be clipped to.
        raise ConfigError(
            f"config.sampling.threshold={name!r}: {kind} are not clipped; expected 'auto' or 'none'"
        )
    return name


def time_grid(config: Config, built: Model) -> Callable[[int], np.ndarray]:
    """`steps -> times` from 1 to 0, as the config names it."""
    name, _ = configs.component(config.sampling.grid, "sampling.grid")
    if name == "uniform":
        return time_grids.uniform
    if built.schedule is None:
        raise ConfigError(
            f"config.sampling.grid.name={name!r}: the process {config.process.name!r} has no "
            "schedule of noise levels; expected 'uniform'"
        )
    if name == "shifted":
        shift = config.sampling.grid.shifted.shift
        return lambda steps: time_grids.shifted(time_grids.uniform(steps), shift)
    return functools.partial(_karras, built.schedule, config.sampling.grid.karras.rho)


def _karras(noise_schedule: schedules.Schedule, rho: float, steps: int) -> np.ndarray:
    """Karras et al. 2022, eq. 5, between the noise levels of t = 1 (0.998 where alpha(1) = 0)
    and sigma/alpha = 0.002."""
    top = 1.0 if noise_schedule.alpha(1.0) > 0 else 0.998
    sigma_max = float(np.exp(-0.5 * noise_schedule.logsnr(top)))
    return time_grids.karras(noise_schedule, steps, sigma_min=0.002, sigma_max=sigma_max, rho=rho)


def pipeline(config: Config, built: Model, params: PyTree, on: Mesh) -> PixelPipeline:
    """The sampler of a trained model."""
    with section("sampling"):
        return PixelPipeline(
            params=params,
            denoiser=built.denoiser,
            process=built.process,
            schedule=built.schedule,
            spec=built.spec,
            conditional=built.conditional,
            guidable=config.objective[config.objective.name].label_dropout > 0,
            times=time_grid(config, built),
            mesh=on,
            defaults=sampling_options(config, built),
        )
