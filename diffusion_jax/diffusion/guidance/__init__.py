"""Guidance: denoisers in, a denoiser out.

All move the pair (x0, eps) of one denoiser, the guide, away from it by what others say of the same
state; see `combining` for what they have in common. Times outside `interval` are the guide's own,
and its variance_fraction is kept. A guidance of 1, and a scale of 0, is the guide itself.

  classifier_free       away from the unconditional, or from a negative condition
  composed              the weighted sum of several conditions
  autoguidance          away from a weaker model of the same data
  perturbed_attention   away from the network without its attention maps
  cfg_zero              classifier-free with an optimised scale, and a start at rest
  projected             classifier-free without its parallel part, bounded, with momentum (APG)
  classifier            along the gradient of log p(y | x_t)

Tokens, whose x0 are probabilities, have `guidance_tokens`.
"""

from __future__ import annotations

from diffusion_jax.diffusion.guidance.classifier import classifier
from diffusion_jax.diffusion.guidance.classifier_free import (
    autoguidance,
    classifier_free,
    composed,
    perturbed_attention,
)
from diffusion_jax.diffusion.guidance.projected import projected
from diffusion_jax.diffusion.guidance.zero_star import cfg_zero

__all__ = [
    "autoguidance",
    "cfg_zero",
    "classifier",
    "classifier_free",
    "composed",
    "perturbed_attention",
    "projected",
]
