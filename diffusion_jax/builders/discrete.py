"""Bits and tokens: which process, data, objective and network go together, and their parts."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.config import Config
from diffusion_jax.data import DataSpec
from diffusion_jax.diffusion import denoiser, processes
from diffusion_jax.errors import ConfigError, section, unknown_name
from diffusion_jax.networks import NETWORKS, TokenNetwork

PROCESSES = {"masked": processes.Masked, "uniform": processes.Uniform}
"""Processes of tokens."""


class _Needs(NamedTuple):
    """What goes with a process: kind of the data, such data in words, objectives."""

    kind: str
    data: str
    objectives: tuple[str, ...]


_TOKENS = "data of tokens, such as 'text', 'markov', or 'digits' with data.digits.binarise=True"
_NEEDS = {
    "binomial": _Needs("bits", "data of bits, such as 'heartbeat'", ("variational",)),
    "masked": _Needs("tokens", _TOKENS, ("variational", "continuous")),
    "uniform": _Needs("tokens", _TOKENS, ("variational",)),
}
_PROCESS_OF = {"bits": "'binomial'", "tokens": "'masked' or 'uniform'"}
_OTHERS = ("denoising", "variational")


def check(config: Config, spec: DataSpec) -> None:
    """Raises ConfigError unless the process fits data, objective and noise input."""
    name, objective = config.process.name, config.objective.name
    if name not in _NEEDS:
        if spec.kind in _PROCESS_OF:
            raise ConfigError(
                f"config.process.name={name!r}: {spec.kind} need the process "
                f"{_PROCESS_OF[spec.kind]}"
            )
        _check_objective(name, objective, _OTHERS)
        return
    needs = _NEEDS[name]
    if spec.kind != needs.kind:
        raise ConfigError(
            f"config.data.name={config.data.name!r}: the process {name!r} needs {needs.data}"
        )
    _check_objective(name, objective, needs.objectives)
    if config.network.noise_input != "t":
        raise ConfigError(
            f"config.network.noise_input={config.network.noise_input!r}: the process {name!r} "
            f"needs 't' (a {name} process has no signal-to-noise ratio)"
        )


def _check_objective(process: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise ConfigError(
            f"config.objective.name={name!r}: the process {process!r} needs "
            f"{' or '.join(map(repr, known))}"
        )


def process(config: Config, options: Mapping[str, Any], spec: DataSpec) -> processes.TokenProcess:
    """The process of tokens that the config names; `options` are its own."""
    name, keep = config.process.name, options["keep"]
    if keep not in processes.KEEPS:
        raise ConfigError(unknown_name(f"config.process.{name}.keep", keep, processes.KEEPS))
    with section(f"process.{name}"):
        return PROCESSES[name](spec.vocabulary, processes.KEEPS[keep])


def constructor(config: Config, spec: DataSpec) -> Callable[..., Any]:
    """The network's class for these data: called with its options and `rngs`."""
    name = config.network.name
    make = NETWORKS[name]
    if spec.kind != "tokens":
        return functools.partial(make, spec.shape)
    known = [n for n, kind in NETWORKS.items() if _has_head(kind)]
    if name not in known:
        raise ConfigError(
            f"config.network.name={name!r}: tokens need one of {', '.join(sorted(known))}"
        )
    return functools.partial(
        TokenNetwork,
        make,
        spec.shape,
        states=spec.vocabulary + (config.process.name == "masked"),
        vocabulary=spec.vocabulary,
        token_dim=config.network.token_dim,
    )


def _has_head(kind: Any) -> bool:
    """Whether the network can put out another number of channels than it takes."""
    return "out_channels" in inspect.signature(kind.__init__).parameters


def as_denoiser(predict: Callable[[Any, Any], Any], process: Any) -> denoiser.Denoiser:
    """The denoiser of a network `(x, t [B]) -> logits`: probabilities of bits or tokens."""

    def step(x: Any, t: Any, carry: Any) -> tuple[denoiser.Denoised, Any]:
        logits = predict(x, jnp.broadcast_to(jnp.asarray(t, jnp.float32), x.shape[:1]))
        if isinstance(process, processes.TokenProcess):
            return denoiser.Denoised(process.estimate(x, jax.nn.softmax(logits))), carry
        # Bits have no Gaussian noise; ancestral sampling reads x0 alone.
        return denoiser.Denoised(x0=jax.nn.sigmoid(logits), eps=jnp.zeros_like(x)), carry

    return denoiser.Denoiser(step=step)


def bound_steps(config: Config) -> int:
    """Steps of the variational bound on held-out examples, 0 where none is asked for."""
    if config.objective.name == "variational":
        return config.objective.variational.num_steps
    return config.objective.continuous.bound_steps if config.objective.name == "continuous" else 0
