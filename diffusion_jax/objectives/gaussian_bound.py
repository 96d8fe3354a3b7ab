"""The variational bound of a Gaussian process in continuous time (Kingma et al. 2021, VDM).

    -log p(x0) <= KL(q(x_1 | x0) || p(x_1)) + E[-log p(x0 | x_first)]
                  + 1/2 int E |x0 - x0_hat(x_t, t)|^2 d snr                                    (1)

the integral by one noise level an example, in strata over the batch; `diffusion.likelihood` has the
terms. A learned schedule moves (1) by its ends alone, which follow its gradient with the network.
Its shape s(u) between them changes nothing but how much the estimate L of the integral varies over
u, so that it minimises the variance instead (their section 5 and appendix H):

    d/ds Var[L] = d/ds E[L^2] = E[2 L dL/ds]                                                   (2)

one and the same backward pass, the part of each example that goes on to s being multiplied by
2 L / mean(L): divided by the mean, it has the size of the other gradients. That mean is over the
real examples of the micro-batch which the objective is given, so that the gradient of the shape,
and it alone, depends a little on into how many of them a batch is split. The estimate is drawn
uniformly in u.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from diffusion_jax.diffusion import likelihood
from diffusion_jax.diffusion.broadcasting import expand
from diffusion_jax.diffusion.learned_schedule import Learned, Level
from diffusion_jax.diffusion.processes import Gaussian
from diffusion_jax.diffusion.schedule_base import Schedule
from diffusion_jax.diffusion.time_sampling import stratified
from diffusion_jax.objectives.base import Aux, Batch, Context, masked_mean, network_params
from diffusion_jax.objectives.denoising import drop_conditioning, split_keys

PyTree = Any
Shape = tuple[Array, Array]
"""s(u) [B] and its derivative [B]."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class GaussianBound:
    """Objective (1) in bits per dimension; metrics give its terms, and bits per example.

    Attributes:
        estimate: `(params, x_t, t [B], conditioning, key, schedule) -> x0_hat`, E[x0 | x_t].
        schedule_of: `params -> schedule`; a `Learned` one is trained.
        decoder: -log p(x0 | x_first).
        first_time: of a schedule that is not learned.
        proposal: how noise levels are drawn, likewise.
        sigma_data: standard deviation of the data, for the proposal "gaussian".
        drop: conditioning name -> probability of the null embedding.
    """

    estimate: Callable[..., Array]
    schedule_of: Callable[[PyTree], Schedule]
    decoder: likelihood.Decoder = dataclasses.field(default_factory=likelihood.Density)
    first_time: float = 1e-3
    proposal: str = "gaussian"
    sigma_data: float = 1.0
    drop: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __call__(
        self, params: PyTree, batch: Batch, key: Key[Array, " batch"], context: Context
    ) -> tuple[Float[Array, ""], Aux]:
        x0, mask = _real(batch["x"], batch.get("mask")), batch.get("mask")
        time_key, noise_key, drop_key, network_key, last_key = split_keys(key, 5)
        u = stratified(jax.vmap(jax.random.uniform)(time_key), context.stratum, context.cells)
        noise, last_noise = (
            jax.vmap(lambda k: jax.random.normal(k, x0.shape[1:], x0.dtype))(keys)
            for keys in (noise_key, last_key)
        )
        conditioning = batch.get("conditioning", {})
        if context.training:
            conditioning = drop_conditioning(conditioning, self.drop, drop_key)
        else:
            network_key = None
        params = network_params(params)
        schedule = self.schedule_of(params)
        diffuse = self._learned if isinstance(schedule, Learned) else self._given
        first = schedule.t_min if isinstance(schedule, Learned) else self.first_time
        terms = {
            "prior": likelihood.prior_term(Gaussian(schedule), x0),
            "reconstruction": likelihood.sum_elements(
                self.decoder(x0, last_noise, schedule.alpha(first), schedule.sigma(first))
            ),
            "diffusion": diffuse(params, x0, noise, u, conditioning, network_key, mask),
        }
        unit = math.log(2.0) * math.prod(x0.shape[1:])
        terms = {name: jnp.asarray(nats) / unit for name, nats in terms.items()}
        bits = sum(terms.values())
        loss, total, count = masked_mean(jnp.asarray(bits), mask)
        metrics = {
            "loss": (total, count),
            "bits_per_example": (total * math.prod(x0.shape[1:]), count),
            **{name: masked_mean(values, mask)[1:] for name, values in terms.items()},
            # Less the square of the mean, the variance that the shape is to minimise.
            "diffusion_square": masked_mean(terms["diffusion"] ** 2, mask)[1:],
        }
        if isinstance(schedule, Learned):
            one = jnp.ones(())
            metrics["logsnr_max"] = (schedule.logsnr_max, one)
            metrics["logsnr_min"] = (schedule.logsnr_min, one)
        return loss, Aux(metrics, context.extra, bits)

    def _given(
        self,
        params: PyTree,
        x0: Array,
        noise: Array,
        u: Array,
        conditioning: Any,
        key: Any,
        mask: Any,
    ) -> Float[Array, " batch"]:
        schedule = self.schedule_of(params)
        t, factor = likelihood.levels(
            u,
            schedule,
            first_time=self.first_time,
            proposal=self.proposal,
            sigma_data=self.sigma_data,
        )
        x_t = jnp.asarray(Gaussian(schedule).forward(x0, t, noise))
        x0_hat = self.estimate(params, x_t, t, conditioning, key, schedule)
        return factor * likelihood.sum_elements((x0 - x0_hat) ** 2)

    def _learned(
        self,
        params: PyTree,
        x0: Array,
        noise: Array,
        u: Array,
        conditioning: Any,
        key: Any,
        mask: Any,
    ) -> Float[Array, " batch"]:
        drawn: Any = self.schedule_of(params)
        t = drawn.time(u)

        def terms(params: PyTree, shape: Shape) -> Array:
            # Of the schedule's parameters the ends alone are read here.
            ends: Any = self.schedule_of(params)
            logsnr = ends.at(shape[0])
            level = Level(logsnr)
            x_t = jnp.asarray(Gaussian(level).forward(x0, t, noise))
            x0_hat = self.estimate(params, x_t, t, conditioning, key, level)
            rate = (ends.logsnr_max - ends.logsnr_min) * shape[1]
            return 0.5 * rate * jnp.exp(logsnr) * likelihood.sum_elements((x0 - x0_hat) ** 2)

        return least_variance(terms, params, drawn.inner(u), mask)


def least_variance(
    terms: Callable[[PyTree, Shape], Array], params: PyTree, shape: Shape, mask: Any = None
) -> Float[Array, " batch"]:
    """terms(params, shape) [B], each of its own row of `shape`, with gradient (2) for the shape.

    The gradient for `params` is that of the values. Rows where `mask` is False are not in the mean.
    """

    @jax.custom_vjp
    def values(params: PyTree, shape: Shape) -> Array:
        return terms(params, shape)

    def forward(params: PyTree, shape: Shape) -> tuple[Array, Any]:
        found, pull = jax.vjp(terms, params, shape)
        return found, (pull, found)

    def backward(kept: Any, cotangent: Array) -> tuple[PyTree, Shape]:
        pull, found = kept
        to_params, to_shape = pull(cotangent)
        mean = masked_mean(found, mask)[0]
        scale = 2.0 * found / jnp.maximum(mean, jnp.finfo(found.dtype).tiny)
        if mask is not None:
            scale = jnp.where(mask, scale, 0.0)
        return to_params, jax.tree.map(lambda a: scale * a, to_shape)

    values.defvjp(forward, backward)
    return values(params, shape)


def _real(x0: Array, mask: Any) -> Array:
    """`x0` with zeros for padding, whatever lies there: 0 times NaN would be in all gradients."""
    return x0 if mask is None else jnp.where(expand(mask, x0) > 0, x0, 0.0)
