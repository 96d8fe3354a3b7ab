"""The variational bound of any noising process, one random step at a time.

    -log p(x0) <= KL(q(x_1 | x0) || p(x_1)) + sum_i KL(q(x_s | x_t, x0) || p(x_s | x_t))   (1)

over the steps (t_i, s_i) of a time grid (Sohl-Dickstein et al. 2015, eq. 12-14; Ho et al. 2020,
eq. 5). Drawing one step i uniformly and multiplying its term by their number is unbiased; drawing
it by strata over the batch makes the estimate far less noisy. Which process it is, only the
process knows.

Every parameter of a learned process follows the gradient of (1), that of the expectation included.
It passes through x_t where that is a smooth function of the noise, but not through bits and tokens.
For these, two states a and b are drawn, with terms f, and the scores of their probabilities enter,
each term being the other's baseline (Kool et al. 2019):

    d/dphi E f = E [(df_a + df_b)/2 + (f_a - f_b)/2 d(log q(a | x0) - log q(b | x0))]      (2)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from diffusion_jax.diffusion import likelihood
from diffusion_jax.diffusion.processes import Discrete
from diffusion_jax.diffusion.time_sampling import stratified
from diffusion_jax.objectives.base import Aux, Batch, Context, masked_mean, network_params
from diffusion_jax.objectives.denoising import drop_conditioning, split_keys

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Variational:
    """Objective (1) in bits per dimension; metrics also give bits per example.

    Attributes:
        estimate: `(params, x_t, t [B], conditioning, key) -> x0_hat`, E[x0 | x_t].
        process: a `diffusion.processes.Process`.
        process_of: `params -> process`, where they decide it: a learned schedule. At few steps its
            shape moves the bound too.
        times: decreasing times of the steps, from 1 to 0.
        drop: conditioning name -> probability of the null embedding.
    """

    estimate: Callable[..., Array]
    process: Any
    times: np.ndarray
    drop: Mapping[str, float] = dataclasses.field(default_factory=dict)
    process_of: Callable[[PyTree], Any] | None = None

    def __call__(
        self, params: PyTree, batch: Batch, key: Key[Array, " batch"], context: Context
    ) -> tuple[Float[Array, ""], Aux]:
        x0 = batch["x"]
        params = network_params(params)
        process = self.process if self.process_of is None else self.process_of(params)
        time_key, noise_key, drop_key, network_key = split_keys(key, 4)
        u = stratified(jax.vmap(jax.random.uniform)(time_key), context.stratum, context.cells)
        t, s = likelihood.random_step(self.times, u)
        conditioning = batch.get("conditioning", {})
        if context.training:
            conditioning = drop_conditioning(conditioning, self.drop, drop_key)
        else:
            network_key = None

        def drawn(key: Any) -> tuple[Any, Any]:
            noise = jax.vmap(lambda k: process.noise(k, x0.shape[1:]))(key)
            x_t = process.forward(x0, t, noise)
            x0_hat = self.estimate(params, x_t, t, conditioning, network_key)
            return x_t, likelihood.variational_term(process, x0, x_t, x0_hat, t, s)

        steps = len(self.times) - 1
        if self.process_of is not None and isinstance(process, Discrete):
            term = _with_score(process, x0, t, *(drawn(k) for k in split_keys(noise_key, 2)))
        else:
            _, term = drawn(noise_key)
        nats = steps * term + likelihood.prior_term(process, x0)
        dimensions = math.prod(x0.shape[1:])
        bits = jnp.asarray(nats) / (dimensions * math.log(2.0))
        loss, total, count = masked_mean(bits, batch.get("mask"))
        metrics = {"loss": (total, count), "bits_per_example": (total * dimensions, count)}
        return loss, Aux(metrics, context.extra, bits)


def _with_score(process: Discrete, x0: Any, t: Any, one: Any, other: Any) -> Float[Array, " batch"]:
    """The mean of two terms, with the gradient (2)."""
    states, terms = zip(one, other, strict=True)
    chances = (process.marginal(x0, t).log_prob(x_t).reshape(len(x_t), -1) for x_t in states)
    score = jnp.subtract(*(jnp.sum(nats, axis=1) for nats in chances))
    ahead = jax.lax.stop_gradient(terms[0] - terms[1])
    mean = 0.5 * (terms[0] + terms[1])
    return mean + 0.5 * ahead * (score - jax.lax.stop_gradient(score))
