"""Denoisers extrapolated to one: classifier-free guidance and what has its form.

  (1)  x0  = x0_c  + sum_i k_i (x0_c  - x0_i)
  (2)  eps = eps_c + sum_i k_i (eps_c - eps_i)

with a conditional c and others i. Ho & Salimans 2022 have one other, the unconditional u, and
k = w - 1 for a guidance w: 1 is the conditional denoiser, 0 the unconditional. The ordinary
differential equation of the result does not sample p_u (p_c / p_u)^w.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from diffusion_jax.diffusion.broadcasting import Number, Real
from diffusion_jax.diffusion.denoiser import Denoised, Denoiser
from diffusion_jax.diffusion.guidance.combining import Branch, Pair, guided, lifted, scaled_away
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
      ValueError: no unconditional branch; an interval that is empty, or a rescale outside 0 to 1;
        when the denoiser is traced, eps of one of the two alone.
    """
    conditional = lifted("conditional", conditional)
    unconditional = lifted("unconditional", unconditional)
    result = _extrapolated(conditional, [(unconditional, guidance, 1.0)], interval, rescale)
    # Only a plain number is known to be 1 here.
    return conditional if isinstance(guidance, Number) and guidance == 1.0 else result


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
      perturbed: the same network and condition, each token attending to itself alone.
      scale: a scalar or [B]; may be traced; 0 for none.
      unconditional: of classifier-free guidance beside; None for none.
      guidance: w of that.
      interval, rescale: as of `classifier_free`, for both.

    Raises:
      ValueError: as `classifier_free`; a guidance without `unconditional`.
    """
    # The map of the perturbed attention is k = scale = w - 1.
    others = [(lifted("perturbed", perturbed), scale, 0.0)]
    if unconditional is not None:
        others.append((lifted("unconditional", unconditional), guidance, 1.0))
    elif not isinstance(guidance, Number) or guidance != 1.0:
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
    if not conditions or len(weights) != len(conditions):
        raise ConfigError(
            f"weights has {len(weights)} entries for {len(conditions)} conditions; "
            "expected one for each, one at least"
        )

    def rule(x: Any, t: Any, first: Denoised, others: Any, memory: Any) -> tuple[Pair, Any]:
        base, *rest = others
        move = scaled_away(weights[0] - 1.0, first, base, x)
        for weight, other in zip(weights[1:], rest, strict=True):
            move = jax.tree.map(lambda a, b: a + b, move, scaled_away(weight, other, base, x))
        return move, memory

    first, *rest = (lifted("conditions", one) for one in conditions)
    others = [lifted("unconditional", unconditional), *rest]
    return guided(first, others, rule, interval=interval, rescale=rescale)


def _extrapolated(
    guide: Denoiser,
    others: Sequence[tuple[Denoiser, Real, float]],
    interval: Sequence[Number],
    rescale: Number,
) -> Denoiser:
    """(1) and (2) for others (denoiser, weight, weight of none): k = weight - weight of none."""

    def rule(x: Any, t: Any, guide: Denoised, said: Any, memory: Any) -> tuple[Pair, Any]:
        moves = [
            scaled_away(weight - none, guide, other, x)
            for (_, weight, none), other in zip(others, said, strict=True)
        ]
        return jax.tree.map(lambda *parts: sum(parts[1:], parts[0]), *moves), memory

    return guided(guide, [o for o, _, _ in others], rule, interval=interval, rescale=rescale)
