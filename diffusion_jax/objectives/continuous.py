"""The bound of masked diffusion in continuous time.

    -log p(x0) <= E_t E_{x_t} sum over masks of -keep'(t) / (1 - keep(t)) (-log p(x0 | x_t)),    (1)

t uniform in (0, 1): a weighted cross entropy of the masked tokens (Sahoo et al. 2024, MDLM, eq. 10;
Shi et al. 2024, eq. 4). It is the limit of `objectives.variational` in infinitely many steps, below
all of them, and the same for every schedule; with the exact p(x0 | x_t) it is the entropy. Times
are drawn by strata over the batch, which takes most of the variance out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from diffusion_jax.diffusion.likelihood import sum_elements
from diffusion_jax.diffusion.processes.masked import Masked
from diffusion_jax.diffusion.time_sampling import stratified
from diffusion_jax.objectives.base import Aux, Batch, Context, masked_mean, network_params
from diffusion_jax.objectives.denoising import drop_conditioning, split_keys

PyTree = Any
FIRST_TIME = 1e-4
"""Times go from here to 1. The stretch below would hold 1e-4 of the bound where the tokens are
certain from their neighbours, and divide by zero at its end."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Continuous:
    """Objective (1) in bits per token; metrics also give bits per example.

    Attributes:
        estimate: `(params, x_t, t [B], conditioning, key) -> x0_hat [B, ..., K]`, p(x0 | x_t).
        process: masked diffusion.
        drop: conditioning name -> probability of the null embedding.
    """

    estimate: Callable[..., Array]
    process: Masked
    drop: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __call__(
        self, params: PyTree, batch: Batch, key: Key[Array, " batch"], context: Context
    ) -> tuple[Float[Array, ""], Aux]:
        x0 = batch["x"]
        time_key, noise_key, drop_key, network_key = split_keys(key, 4)
        u = stratified(jax.vmap(jax.random.uniform)(time_key), context.stratum, context.cells)
        t = FIRST_TIME + (1.0 - FIRST_TIME) * u
        noise = jax.vmap(lambda k: self.process.noise(k, x0.shape[1:]))(noise_key)
        conditioning = batch.get("conditioning", {})
        if context.training:
            conditioning = drop_conditioning(conditioning, self.drop, drop_key)
        else:
            network_key = None
        x_t = jnp.asarray(self.process.forward(x0, t, noise))
        x0_hat = self.estimate(network_params(params), x_t, t, conditioning, network_key)
        nats = jnp.asarray(self.process.kl_rate(x0, x_t, x0_hat, t))
        tokens = math.prod(x0.shape[1:])
        bits = (1.0 - FIRST_TIME) / (tokens * math.log(2.0)) * sum_elements(nats)
        loss, total, count = masked_mean(bits, batch.get("mask"))
        metrics = {"loss": (total, count), "bits_per_example": (total * tokens, count)}
        return loss, Aux(metrics, context.extra, bits)
