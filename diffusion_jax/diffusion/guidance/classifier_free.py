"""Denoisers extrapolated to one: classifier-free guidance and what has its form.

  (1)  x0  = x0_c  + sum_i k_i (x0_c  - x0_i)
  (2)  eps = eps_c + sum_i k_i (eps_c - eps_i)

with a conditional c and others i. Ho & Salimans 2022 have one other, the unconditional u, and
k = w - 1 for a guidance w: 1 is the conditional denoiser, 0 the unconditional. The ordinary
differential equation of the result does not sample p_u (p_c / p_u)^w.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from diffusion_jax.diffusion.broadcasting import Number, Real
from diffusion_jax.diffusion.denoiser import Denoised, Denoiser
from diffusion_jax.diffusion.guidance.combining import (
    Branch,
    Pair,
    check_real,
    guided,
    is_number,
    lifted,
    scaled_away,
)
from diffusion_jax.errors import ConfigError


def classifier_free(
    conditional: Branch,
    unconditional: Branch | None,
    guidance: Real,
    *,
    interval: Sequence[Number] = (0.0, 1.0),
    rescale: Number = 0.0,
) -> Denoiser:
    """The denoiser of (1) and (2) for the guidance w.

    Args:
      conditional: a denoiser or a function of (x, t); its variance_fraction is kept.
      unconditional: likewise; not evaluated in a step whose times are all outside the interval, nor
        at all if `guidance` is the number 1. One with a condition of its own, a negative prompt, is
        what the result turns away from.
      guidance: w, a scalar or [B]; may be traced.
      interval: (low, high): times low <= t <= high are guided, others conditional.
      rescale: 0 to 1, how far the standard deviation of x0 is brought back to the conditional one;
        see `combining`.

    Returns:
      A denoiser that carries both carries; `conditional` itself for the number 1.

    Raises:
      ValueError: no unconditional branch; a guidance that is no finite number; an interval that is
        empty, or a rescale outside 0 to 1; when the denoiser is traced, a guidance of another batch
        or eps of one of the two alone.
    """
    conditional = lifted("conditional", conditional)
    unconditional = lifted("unconditional", unconditional)
    others = [_Other(unconditional, "guidance", guidance, 1.0)]
    return _extrapolated(conditional, others, interval, rescale)


def autoguidance(
    model: Branch,
    weak: Branch,
    guidance: Real,
    *,
    interval: Sequence[Number] = (0.0, 1.0),
    rescale: Number = 0.0,
) -> Denoiser:
    """(1) and (2) away from a weaker model of the same data and condition.

    Karras et al. 2024, "Guiding a Diffusion Model with a Bad Version of Itself", eq. 3, with
    D_0 = `weak`: a smaller network, one less trained, an earlier checkpoint. It needs no
    unconditional branch. Arguments, result and errors as of `classifier_free`.
    """
    model, weak = lifted("model", model), lifted("weak", weak)
    return classifier_free(model, weak, guidance, interval=interval, rescale=rescale)


def perturbed_attention(
    conditional: Branch,
    perturbed: Branch,
    scale: Real,
    *,
    unconditional: Branch | None = None,
    guidance: Real = 1.0,
    interval: Sequence[Number] = (0.0, 1.0),
    rescale: Number = 0.0,
) -> Denoiser:
    """(1) and (2) away from the network whose self-attention maps are the identity.

    Ahn et al. 2024, "Self-Rectifying Diffusion Sampling with Perturbed-Attention Guidance", eq. 15:
    k = scale; with `unconditional` also k = guidance - 1 for that, as they combine the two.

    Args:
      conditional: its variance_fraction is kept. It may be a model without conditions.
      perturbed: the same network and condition, each token attending to itself alone; not
        evaluated if `scale` is the number 0.
      scale: a scalar or [B]; may be traced; 0 for none.
      unconditional: of classifier-free guidance beside; None for none.
      guidance: w of that.
      interval, rescale: as of `classifier_free`, for both.

    Returns:
      A denoiser that carries the carries of all that is evaluated; `conditional` itself where the
      plain numbers leave nothing.

    Raises:
      ValueError: as `classifier_free`; a guidance without `unconditional`.
    """
    # The map of the perturbed attention is k = scale = w - 1.
    others = [_Other(lifted("perturbed", perturbed), "scale", scale, 0.0)]
    if unconditional is not None:
        others.append(_Other(lifted("unconditional", unconditional), "guidance", guidance, 1.0))
    elif not is_number(guidance) or guidance != 1.0:
        raise ConfigError(f"guidance={guidance!r} needs the unconditional denoiser; expected 1")
    return _extrapolated(lifted("conditional", conditional), others, interval, rescale)


def composed(
    conditions: Sequence[Branch],
    unconditional: Branch | None,
    weights: Sequence[Real],
    *,
    interval: Sequence[Number] = (0.0, 1.0),
    rescale: Number = 0.0,
) -> Denoiser:
    """x0 = x0_u + sum_i w_i (x0_i - x0_u), and eps alike: several conditions at once.

    Liu et al. 2022, "Compositional Visual Generation with Composable Diffusion Models", eq. 11, and
    with a negative weight eq. 13 (a condition that is to be absent). One condition is
    `classifier_free`.

    Args:
      conditions: denoisers of one model under each condition. Outside the interval the first is
        sampled; its variance_fraction is kept, and `rescale` follows its deviation.
      unconditional: the same without a condition.
      weights: w_i, one a condition, each a scalar or [B]; may be traced.
      interval, rescale: as of `classifier_free`.

    Returns:
      A denoiser that carries those of the first condition, the unconditional and the others.

    Raises:
      ValueError: no condition, or another number of weights; no unconditional branch; as
        `classifier_free`.
    """
    for name, given in (("conditions", conditions), ("weights", weights)):
        if not isinstance(given, Sequence) and getattr(given, "ndim", 0) != 1:
            raise ConfigError(f"{name}={given!r}: expected a list, one entry a condition")
    if not len(conditions) or len(weights) != len(conditions):
        raise ConfigError(
            f"weights has {len(weights)} entries for {len(conditions)} conditions; "
            "expected one for each, one at least"
        )

    def rule(x: Any, t: Any, first: Denoised, others: Any, memory: Any) -> tuple[Pair, Any]:
        base, *rest = others
        move = scaled_away("weights", weights[0] - 1.0, first, base, x)
        for weight, other in zip(weights[1:], rest, strict=True):
            more = scaled_away("weights", weight, other, base, x)
            move = jax.tree.map(lambda a, b: a + b, move, more)
        return move, memory

    for weight in weights:
        check_real("weights", weight)
    first, *rest = (lifted("conditions", one) for one in conditions)
    others = [lifted("unconditional", unconditional), *rest]
    return guided(first, others, rule, interval=interval, rescale=rescale)


class _Other(NamedTuple):
    """What is turned away from, by k = weight - none in (1) and (2); `name` is the weight's."""

    denoiser: Denoiser
    name: str
    weight: Real
    none: float


def _extrapolated(
    guide: Denoiser, others: Sequence[_Other], interval: Any, rescale: Any
) -> Denoiser:
    """(1) and (2); the guide itself where no other is left."""
    for other in others:
        check_real(other.name, other.weight)
    # Only a plain number is known to be that of none here.
    left = [one for one in others if not is_number(one.weight) or one.weight != one.none]

    def rule(x: Any, t: Any, guide: Denoised, said: Any, memory: Any) -> tuple[Pair, Any]:
        moves = [
            scaled_away(one.name, one.weight - one.none, guide, other, x)
            for one, other in zip(left, said, strict=True)
        ]
        return jax.tree.map(lambda *parts: sum(parts[1:], parts[0]), *moves), memory

    denoisers = [one.denoiser for one in left]
    result = guided(guide, denoisers, rule, interval=interval, rescale=rescale)
    return result if left else guide
