"""The parts that training and sampling share: data, process, network."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import config as configs
from diffusion_jax import data
from diffusion_jax.builders import discrete, learned
from diffusion_jax.config import Config
from diffusion_jax.data import DataSpec, Source
from diffusion_jax.diffusion import (
    denoiser,
    predictions,
    processes,
    schedules,
)
from diffusion_jax.diffusion.learned_betas import LearnedBetas, learned_betas
from diffusion_jax.diffusion.processes import LearnedKeep
from diffusion_jax.errors import ConfigError, named, section, unknown_name
from diffusion_jax.networks import Network, TextConfig, functional
from diffusion_jax.networks.attention import ATTENTIONS
from diffusion_jax.networks.presets_dit import dit_preset, uvit_preset
from diffusion_jax.networks.presets_unet import edm2_preset, unet_preset

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """The parts that training and sampling share.

    Attributes:
        network: pure functions.
        spec: the data.
        process: the noising process.
        schedule: of a Gaussian process, else None; a learned one as it begins.
        prediction: what the network puts out; "logits" of bits and tokens.
        sigma_data: for EDM preconditioning.
        conditions: names of the conditioning that the network reads: label, text, scalar.
        perturbed: the network, of the same parameters, whose self-attention maps are the identity;
            None where it has no attention.
    """

    network: Network
    spec: DataSpec
    process: Any
    schedule: Any
    prediction: str
    sigma_data: float
    conditions: tuple[str, ...]
    perturbed: Callable[[], Network] | None = None

    @property
    def conditional(self) -> bool:
        """Whether the network reads labels."""
        return "label" in self.conditions

    @property
    def learns_variance(self) -> bool:
        """Whether the network also puts out the variances of the reverse kernels."""
        return isinstance(self.process, processes.LearnedGaussian)

    @property
    def learns_schedule(self) -> bool:
        """Whether parameters of the schedule lie beside the network's, as `params["schedule"]`."""
        return isinstance(self._learned, schedules.Learned | LearnedBetas | LearnedKeep)

    def schedule_of(self, params: PyTree) -> Any:
        """The schedule that these parameters mean; the given one where none is learned."""
        if self.schedule is None or not self.learns_schedule:
            return self.schedule
        return self.schedule.with_params(params[learned.SCHEDULE])

    def process_of(self, params: PyTree) -> Any:
        """The process with the schedule of these parameters."""
        if not self.learns_schedule:
            return self.process
        own = self._learned.with_params(params[learned.SCHEDULE])
        name = "keep" if self.schedule is None else "schedule"
        return dataclasses.replace(self.process, **{name: own})

    @property
    def _learned(self) -> Any:
        """The schedule, or how long bits are kept; learned or not."""
        return getattr(self.process, "keep", None) if self.schedule is None else self.schedule

    def denoiser(
        self, params: PyTree, conditioning: Mapping[str, Any], schedule: Any = None
    ) -> denoiser.Denoiser:
        """The network bound to parameters and conditioning.

        `schedule`: to be taken in place of that of the parameters.
        """

        def predict(x: Any, noise: Any) -> Any:
            return self.network.apply(params, x, noise, conditioning)

        if self.schedule is not None:
            return denoiser.from_network(
                predict,
                self.schedule_of(params) if schedule is None else schedule,
                self.prediction,
                noise_input=self.network.noise_input,
                sigma_data=self.sigma_data,
                learned_variance=self.learns_variance,
            )

        return discrete.as_denoiser(predict, self.process)

    @functools.cached_property
    def perturbed_denoiser(self) -> Callable[..., denoiser.Denoiser] | None:
        """`denoiser` of the perturbed network, built when it is first asked for."""
        if self.perturbed is None:
            return None
        return dataclasses.replace(self, network=self.perturbed(), perturbed=None).denoiser

    def estimate(
        self, params: PyTree, x: Any, t: Any, conditioning: Any, key: Any, schedule: Any = None
    ) -> Any:
        """x0_hat = E[x0 | x_t] as the variational objective wants it, with the variances' fraction
        where they are learned; `key` for dropout."""
        apply = functools.partial(self.network.apply, key=key)
        keyed = dataclasses.replace(self, network=dataclasses.replace(self.network, apply=apply))
        denoised = keyed.denoiser(params, conditioning, schedule)(x, t)
        return processes.with_fraction(denoised) if self.learns_variance else denoised.x0


OWN_DATA = ("image_folder", "webdataset", "parquet", "latents")


def source(config: Config, split: str) -> Source:
    """The examples of a split."""
    name, options = configs.component(config.data, "data")
    if name == "tfds":
        options["data_dir"] = config.data.data_dir or None
    if name in (*OWN_DATA, "text"):
        options["path"] = config.data.path
    with named("config."), section(f"data.{name}"):
        return data.load(name, split, **options)


def schedule(config: Config) -> schedules.Schedule:
    """The noise schedule of a Gaussian process."""
    field = "process.gaussian.schedule"
    name, options = configs.component(config.process.gaussian.schedule, field)
    with named(f"config.{field}.{name}: "), section(f"{field}.{name}"):
        if name == "table":
            return schedules.table(_betas(options["betas"])(options["steps"]))
        if name == "betas":
            # Of each step of the bound one; `learned.check` refuses a bound without steps.
            steps = config.objective.variational.num_steps
            return learned_betas(max(steps, 2), **options)
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


def resolve(config: Config) -> Config:
    """A copy that leaves nothing to the machine: what a run is made with and its workdir keeps."""
    resolved = configs.from_json(configs.to_json(config))
    resolved.compute_dtype = _compute_dtype(config)
    return resolved


def _compute_dtype(config: Config) -> str:
    if config.compute_dtype != "auto":
        return config.compute_dtype
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def network(config: Config, spec: DataSpec, *, perturbed: bool = False) -> Network:
    """The score network for data of this shape; `perturbed`: with the identity for attention."""
    name, options = configs.component(config.network, "network")
    if config.network.noise_input not in denoiser.NOISE_INPUTS:
        field, known = "config.network.noise_input", denoiser.NOISE_INPUTS
        raise ConfigError(unknown_name(field, config.network.noise_input, known))
    options["dtype"] = jnp.dtype(_compute_dtype(config))
    _check_attention(f"config.network.{name}.attention", options)
    _check_effect(name, options)
    options["noise_input"] = config.network.noise_input
    conditions = _conditions(config, spec)
    options["num_classes"] = spec.num_classes if "label" in conditions else 0
    options["scalars"] = len(spec.scalars)
    options["text"] = _text(config, spec)
    if preset := options.pop("preset", ""):
        with named("config."), section(f"network.{name}.preset"):
            options |= _preset(name, preset, options)
    if perturbed:
        options["attention"] = "identity"
    if learned.has_variance(config):
        options |= {"outputs": 2} if name == "mlp" else {"out_channels": 2 * spec.shape[-1]}
    with named("config."), section(f"network.{name}"):
        made = functional(functools.partial(discrete.constructor(config, spec), **options))
    if config.process.name == "binomial":
        keep = learned.bits(config).keep
        return learned.beside(made, keep) if isinstance(keep, LearnedKeep) else made
    named_schedule = config.process.gaussian.schedule.name
    if config.process.name != "gaussian" or named_schedule not in learned.SCHEDULES:
        return made
    noise_schedule: Any = schedule(config)
    return learned.beside(made, noise_schedule)


PRESETS = {
    "dit": dit_preset,
    "edm2": edm2_preset,
    "unet": unet_preset,
    "uvit": uvit_preset,
}


def _check_effect(name: str, options: Mapping[str, Any]) -> None:
    """Refuses options of the U-Net that another one makes void."""
    if name != "unet" or options["preset"]:
        return
    heads = configs.base().network.unet.heads
    if options["head_dim"] and options["heads"] != heads:
        raise ConfigError(
            f"config.network.unet.heads={options['heads']}: head_dim={options['head_dim']} decides "
            f"their number; expected {heads}, or config.network.unet.head_dim=0"
        )
    if options["resample_projection"] and options["resample"] != "block":
        raise ConfigError(
            f"config.network.unet.resample_projection=True: no block resamples with "
            f"resample={options['resample']!r}; expected False, or resample='block'"
        )


def _preset(name: str, preset: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a preset, which may not silently replace one that was set otherwise."""
    found, defaults = PRESETS[name](preset), configs.base().network[name]
    for option, value in found.items():
        if options[option] not in (defaults[option], value):
            raise ConfigError(
                f"config.network.{name}.{option}={options[option]!r}: the preset {preset!r} has "
                f"{value!r}; take one of them, or config.network.{name}.preset=''"
            )
    return found


def _conditions(config: Config, spec: DataSpec) -> tuple[str, ...]:
    """What of the data's conditioning the network reads."""
    given = {
        "label": config.network.use_labels and spec.num_classes > 0,
        "text": config.text.name != "none",
        "scalar": bool(spec.scalars),
    }
    return tuple(name for name, used in given.items() if used)


def _text(config: Config, spec: DataSpec) -> TextConfig | None:
    name, options = configs.component(config.text, "text")
    if name == "none":
        return None
    if not spec.text_length:
        raise ConfigError(f"config.text.name={name!r}: the data have no captions; expected 'none'")
    with section(f"text.{name}"):
        return TextConfig(**options)


def _check_attention(field: str, options: Mapping[str, Any]) -> None:
    chosen = options.get("attention", "auto")
    # Without its maps a network is for guidance to turn away from, and not to be trained.
    known = [name for name in ATTENTIONS if name != "identity"]
    if chosen not in known:
        raise ConfigError(unknown_name(field, chosen, known))
    if chosen != "cudnn":
        return
    if jax.default_backend() != "gpu":
        raise ConfigError(
            f"{field}='cudnn': this machine computes on {jax.default_backend()}; expected 'auto'"
        )
    if options["dtype"] not in (jnp.bfloat16, jnp.float16):
        raise ConfigError(
            f"{field}='cudnn' computes in 16 bits; expected config.compute_dtype='bfloat16'"
        )


def model(config: Config, spec: DataSpec) -> Model:
    """Network, process and prediction, checked to fit together."""
    process_name, options = configs.component(config.process, "process")
    shared = {
        "spec": spec,
        "conditions": _conditions(config, spec),
        "perturbed": functools.partial(network, config, spec, perturbed=True)
        if "attention" in config.network.get(config.network.name, {})
        else None,
    }
    discrete.check(config, spec)
    if process_name != "gaussian":
        tokens = process_name in discrete.PROCESSES
        return Model(
            network=network(config, spec),
            process=discrete.process(config, options, spec) if tokens else learned.bits(config),
            schedule=None,
            prediction="logits",
            sigma_data=1.0,
            **shared,
        )
    noise_schedule = schedule(config)
    learned.check(config)
    prediction = options["prediction"]
    with named("config.process.gaussian."), section("process.gaussian.prediction"):
        predictions.check_prediction(prediction, noise_schedule)
    return Model(
        network=network(config, spec),
        process=learned.process(config, noise_schedule),
        schedule=noise_schedule,
        prediction=prediction,
        sigma_data=options["sigma_data"],
        **shared,
    )
