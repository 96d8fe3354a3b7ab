"""What is learned of a process besides the data: its schedule, and a Gaussian one's variances.

The parameters of a learned schedule lie beside those of the network, and go wherever they go.
Learned variances are a second half of the network's output.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from diffusion_jax.config import Config
from diffusion_jax.diffusion.learned_betas import LearnedBetas
from diffusion_jax.diffusion.processes import (
    KEEPS,
    Binomial,
    Gaussian,
    LearnedGaussian,
    LearnedKeep,
    learned_keep,
)
from diffusion_jax.diffusion.schedules import Learned, Schedule
from diffusion_jax.errors import ConfigError, unknown_name
from diffusion_jax.networks import Network

SCHEDULES = ("learned", "betas")
"""Names of schedules that are learned."""

SCHEDULE = "schedule"
"""Where they lie. Samplers and averages need them as they need the network's own."""


def beside(network: Network, schedule: Learned | LearnedBetas | LearnedKeep) -> Network:
    """The network with the parameters of the schedule among its own; it does not see them."""

    def init(key: Key[Array, ""]) -> dict[str, Any]:
        first = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), schedule.params)
        return {**network.init(key), SCHEDULE: first}

    def apply(params: Any, *args: Any, **options: Any) -> Any:
        own = {name: tree for name, tree in params.items() if name != SCHEDULE}
        return network.apply(own, *args, **options)

    return dataclasses.replace(network, init=init, apply=apply)


VARIANCES = ("small", "large", "learned")


def has_variance(config: Config) -> bool:
    """Whether the network puts out the variances of the reverse kernels."""
    return config.process.name == "gaussian" and config.process.gaussian.variance == "learned"


def process(config: Config, schedule: Schedule) -> Gaussian:
    """The Gaussian process with the reverse variances that the config names.

    Raises:
        ConfigError: unknown variances, or learned ones without steps to learn them by.
    """
    field, name = "config.process.gaussian.variance", config.process.gaussian.variance
    if name not in VARIANCES:
        raise ConfigError(unknown_name(field, name, VARIANCES))
    if name != "learned":
        return Gaussian(schedule, name)
    if config.objective.name != "variational" or not config.objective.variational.num_steps:
        raise ConfigError(
            f"{field}='learned': variances learn from the bound of finitely many steps; expected "
            "config.objective.name='variational' and config.objective.variational.num_steps of at "
            "least 1, or 'small'"
        )
    return LearnedGaussian(schedule)


def bits(config: Config) -> Binomial:
    """The process of bits with the schedule that the config names.

    Raises:
        ConfigError: an unknown one, or a learned one without steps to learn it by.
    """
    field, name = "config.process.binomial.keep", config.process.binomial.keep
    if name in KEEPS:
        return Binomial(KEEPS[name].keep)
    if name != "learned":
        raise ConfigError(unknown_name(field, name, [*KEEPS, "learned"]))
    steps = config.objective.variational.num_steps
    if config.objective.name != "variational" or steps < 2:
        raise ConfigError(
            f"{field}='learned': it learns from the bound; expected "
            "config.objective.variational.num_steps of at least 2, or 'linear'"
        )
    return Binomial(learned_keep(steps))


def check(config: Config) -> None:
    """Raises ConfigError where a learned schedule meets what cannot be done with it."""
    name = config.process.gaussian.schedule.name
    if name not in SCHEDULES:
        return
    if config.objective.name != "variational":
        raise ConfigError(
            f"config.objective.name={config.objective.name!r}: a learned schedule learns from the "
            "bound alone; expected 'variational', or another config.process.gaussian.schedule.name"
        )
    steps = config.objective.variational.num_steps
    if name == "betas" and steps < 2:
        raise ConfigError(
            f"config.objective.variational.num_steps={steps}: learned betas are those of the "
            "bound's steps; expected at least 2, or config.process.gaussian.schedule.name='learned'"
        )
    if config.sampling.grid.name in ("karras", "exponential", "beta"):
        raise ConfigError(
            f"config.sampling.grid.name={config.sampling.grid.name!r}: the noise levels of a "
            "learned schedule are not known beforehand; expected 'uniform', 'shifted', 'leading', "
            "'linspace', 'trailing' or 'given'"
        )
    if config.sampling.guidance_by.name == "autoguidance":
        raise ConfigError(
            "config.sampling.guidance_by.name='autoguidance': two models with learned schedules "
            "share no noise levels; expected another"
        )
