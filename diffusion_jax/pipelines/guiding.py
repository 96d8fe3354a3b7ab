"""Which kind of guidance samples are drawn with, and its denoiser made of a model's branches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from diffusion_jax.diffusion import guidance as guide
from diffusion_jax.diffusion import schedules
from diffusion_jax.diffusion.denoiser import Denoiser, as_denoiser
from diffusion_jax.diffusion.guidance_tokens import classifier_free_tokens
from diffusion_jax.errors import ConfigError, named
from diffusion_jax.pipelines.guidance_kinds import KINDS, own_options
from diffusion_jax.pipelines.options import SamplingOptions, whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weak:
    """The weaker model of autoguidance.

    Attributes:
        params: its parameters, on the mesh of the model that it guides.
        denoiser: `(params, conditioning) -> Denoiser`, of the same states.
        conditions: names of the conditioning that it reads.
    """

    params: Any
    denoiser: Callable[[Any, Mapping[str, Any]], Denoiser]
    conditions: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Branches:
    """The denoisers that guidance may be made of; those that are costly to bind are functions.

    Attributes:
        conditional: what guidance 1 is.
        other: the unconditional denoiser, or of a negative condition.
        also: under further conditions.
        weak: the weaker model's.
        perturbed: of the network without its attention maps.
        schedule: of the states, None where they have none.
        tokens: whether x0 are probabilities of tokens.
    """

    conditional: Denoiser
    other: Callable[[], Denoiser]
    also: Sequence[Denoiser]
    weak: Callable[[], Denoiser]
    perturbed: Callable[[], Denoiser]
    schedule: Any
    tokens: bool


def combine(
    options: SamplingOptions,
    branches: Branches,
    times: np.ndarray,
    guidance: Any,
    weights: Any,
) -> Denoiser:
    """The guided denoiser; `guidance` and the `weights` of further conditions may be traced."""
    name, first = options.guidance_by, branches.conditional
    own = own_options(options)
    limits: dict[str, Any] = {
        "interval": options.guidance_interval,
        "rescale": options.guidance_rescale,
    }
    if name == "autoguidance":
        combined = classifier_free_tokens if branches.tokens else guide.autoguidance
        return combined(first, branches.weak(), guidance, **limits)
    if name == "perturbed_attention":
        if options.guidance != 1.0:
            limits |= {"unconditional": branches.other(), "guidance": guidance}
        return guide.perturbed_attention(first, branches.perturbed(), own["scale"], **limits)
    if name == "apg":
        return guide.projected(
            first, branches.other(), guidance, branches.schedule, **own, **limits
        )
    if name == "cfg_zero":
        steps = whole("zero_steps", own["zero_steps"], low=0, below=len(times) - 1)
        above = float(times[steps]) if steps else 1.0
        limits["zero_above"] = above
        return guide.cfg_zero(first, branches.other(), guidance, branches.schedule, **limits)
    if branches.also:
        conditions = [first, *branches.also]
        shares = [guidance, *(weights[k] for k in range(len(branches.also)))]
        return guide.composed(conditions, branches.other(), shares, **limits)
    combined = classifier_free_tokens if branches.tokens else guide.classifier_free
    return combined(first, branches.other(), guidance, **limits)


def by_log_probability(options: SamplingOptions, denoise: Denoiser, schedule: Any) -> Denoiser:
    """The denoiser guided by `log_probability`, where one is given."""
    if options.log_probability is None:
        return denoise
    return guide.classifier(
        denoise,
        options.log_probability,
        schedule,
        options.log_probability_scale,
        interval=options.guidance_interval,
        rescale=options.guidance_rescale,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """What of a model decides which guidance it can have.

    Attributes:
        conditions: names of the conditioning that the network reads.
        always: those that training never left out.
        kind: of the data.
        schedule: None where the process has none.
        weak: whether there is a weaker model.
        perturbed: whether the network has attention to be perturbed.
    """

    conditions: tuple[str, ...]
    always: tuple[str, ...]
    kind: str
    schedule: Any
    weak: bool
    perturbed: bool


def check(options: SamplingOptions, model: Model, steps: int, *, negative: bool = False) -> None:
    """Raises ConfigError unless the model can be guided so; `negative`: a condition is given that
    stands in for the unconditional branch."""
    kind = KINDS[options.guidance_by]
    _check_unconditional(options, model, negative)
    if options.log_probability is not None and model.schedule is None:
        raise ConfigError("log_probability: the process has no schedule of noise; leave it")
    if not options.guided:
        return
    by = f"guidance_by={options.guidance_by!r}"
    if kind.gaussian and model.schedule is None:
        raise ConfigError(f"{by}: the process has no schedule of noise; expected 'classifier_free'")
    if not kind.tokens and model.kind == "tokens":
        raise ConfigError(f"{by}: not for tokens; expected 'classifier_free' or 'autoguidance'")
    if options.guidance_by == "autoguidance" and not model.weak:
        raise ConfigError(
            f"{by}: no weaker model is given; load the pipeline with weak=<a workdir> (--weak=DIR)"
        )
    if options.guidance_by == "perturbed_attention" and not model.perturbed:
        raise ConfigError(f"{by}: the network has no self-attention; expected 'classifier_free'")
    _check_own(options, steps)


def _check_unconditional(options: SamplingOptions, model: Model, negative: bool) -> None:
    neutral = (1.0, (0.0, 1.0), 0.0)
    names = ("guidance", "guidance_interval", "guidance_rescale")
    others = KINDS[options.guidance_by]
    free = others.without_condition or options.log_probability is not None
    for name, value in zip(names, neutral, strict=True):
        given = getattr(options, name)
        allowed = free if name != "guidance" else not others.unconditional
        if given != value and not model.conditions and not allowed:
            raise ConfigError(f"{name}={given}: the model is unconditional; expected {value}")
    if options.guidance != 1.0 and others.unconditional and model.always and not negative:
        names = " and ".join(f"{name}_dropout=0" for name in model.always)
        raise ConfigError(
            f"guidance={options.guidance}: the model was trained with {names} and has no "
            "prediction without; expected 1"
        )


def _check_own(options: SamplingOptions, steps: int) -> None:
    """Builds the guidance of nothing, which judges its own options."""
    nothing = as_denoiser(lambda x, t: x)
    branches = Branches(
        conditional=nothing,
        other=lambda: nothing,
        also=(),
        weak=lambda: nothing,
        perturbed=lambda: nothing,
        schedule=schedules.cosine(),
        tokens=False,
    )
    with named(f"{options.guidance_by}."):
        combine(options, branches, np.linspace(1.0, 0.0, steps + 1), 2.0, ())


def check_given(given: Mapping[str, Any], options: SamplingOptions) -> None:
    """Raises ConfigError for a kind of guidance that a call names and that has no effect, as
    neither the call nor the defaults give a guidance.

    Args:
        given: the options of the call.
        options: these over the defaults.
    """
    by, unguided = given.get("guidance_by"), not options.guided and given.get("guidance") is None
    if unguided and by not in (None, "classifier_free"):
        raise ConfigError(
            f"guidance_by={by!r} has no effect with guidance=1.0; give a guidance above 1 with it"
        )


def check_extra(options: SamplingOptions, model: Model, *, negative: bool, also: int) -> None:
    """Raises ConfigError for a negative or a further condition that would have no effect."""
    by, kind = options.guidance_by, KINDS[options.guidance_by]
    if negative and not kind.unconditional:
        raise ConfigError(f"guidance_by={by!r} has no branch for a negative condition; leave it")
    if negative and options.guidance == 1.0 and not also:
        raise ConfigError(
            "guidance=1.0: a negative condition has no effect; expected a guidance above 1"
        )
    if not also:
        return
    if by != "classifier_free" or model.kind == "tokens":
        what = "tokens are not composed" if model.kind == "tokens" else f"guidance_by={by!r}"
        raise ConfigError(f"{what}: leave further conditions (also_...), or 'classifier_free'")
    if model.always and not negative:
        raise ConfigError(
            f"also_...: the model was trained with {model.always[0]}_dropout=0 and has no "
            "prediction without; leave further conditions"
        )
