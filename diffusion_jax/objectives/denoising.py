"""Denoising: the weighted regression that trains every Gaussian diffusion model.

    x_t = alpha(t) x0 + sigma(t) eps,          t from a time sampling, eps ~ N(0, I)       (1)
    loss = E_{x0, t, eps} [ w(t) |f(x_t, t) - target(x0, eps, t)|^2 / dim ]               (2)

The target is the network's declared prediction (x0, eps, v, score, velocity, or the raw output of
an EDM-preconditioned network, Karras et al. 2022, eq. 8); w is the factor that expresses a
weighting in the space of that prediction (`diffusion.weightings`). With some probability the
conditioning of an example is dropped (Ho & Salimans 2022), which classifier-free guidance needs.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from diffusion_jax.diffusion import denoiser, predictions
from diffusion_jax.objectives.base import Aux, Batch, Context, Metrics, masked_mean

PyTree = Any
NOISE_BIN_EDGES = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)
"""Edges in logsnr between the bins in which the loss is reported."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Denoising:
    """Objective (2). An instance is `objective(params, batch, key, context)`.

    Attributes:
        apply: `(params, x, noise, conditioning, key=) -> output`, the network.
        noise_input: what the network wants to know about the noise level.
        schedule: `diffusion.schedules.Schedule`.
        prediction: what the network puts out; "edm" for a preconditioned network.
        sample_time: `(u [B], stratum [B], cells) -> t [B]`, u uniform, the rest from `Context`.
        weight: `(alpha [B], sigma [B]) -> [B]`, factor on the error of the network's output.
        sigma_data: standard deviation of the data, for "edm".
        drop: conditioning name -> probability of replacing it by the network's null embedding.
    """

    apply: Callable[..., Array]
    noise_input: str
    schedule: Any
    prediction: str
    sample_time: Callable[[Any, Any, int], Any]
    weight: Callable[[Any, Any], Any]
    sigma_data: float = 0.5
    drop: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __call__(
        self, params: PyTree, batch: Batch, key: Key[Array, " batch"], context: Context
    ) -> tuple[Float[Array, ""], Aux]:
        x0 = batch["x"]
        time_key, noise_key, drop_key, network_key = split_keys(key, 4)
        u = jax.vmap(jax.random.uniform)(time_key)
        t = self.sample_time(u, context.stratum, context.cells)
        eps = jax.vmap(lambda k: jax.random.normal(k, x0.shape[1:], x0.dtype))(noise_key)
        conditioning = batch.get("conditioning", {})
        if context.training:
            conditioning = drop_conditioning(conditioning, self.drop, drop_key)
        else:
            network_key = None

        error = self._squared_error(params, x0, eps, t, conditioning, network_key)
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        example_loss = self.weight(alpha, sigma) * error
        loss, total, count = masked_mean(example_loss, batch.get("mask"))
        bins = loss_by_noise(example_loss, self.schedule.logsnr(t), batch.get("mask"))
        metrics = {"loss": (total, count), "mse": masked_mean(error, batch.get("mask"))[1:], **bins}
        return loss, Aux(metrics, context.extra, example_loss)

    def _squared_error(
        self, params: PyTree, x0: Any, eps: Any, t: Any, conditioning: Any, key: Any
    ) -> Float[Array, " batch"]:
        """[B] mean squared error of the network's own output against its target."""
        alpha, sigma = (_expand(f(t), x0) for f in (self.schedule.alpha, self.schedule.sigma))
        x_t = alpha * x0 + sigma * eps
        target = predictions.from_x0_eps(
            self.prediction, x0, eps, alpha, sigma, sigma_data=self.sigma_data
        )
        if self.prediction == "edm":
            inputs = predictions.preconditioning(alpha, sigma, self.sigma_data).c_in * x_t
        else:
            inputs = x_t
        noise = denoiser.noise_input(self.noise_input, self.schedule, t)
        output = self.apply(params, inputs, noise, conditioning, key=key)
        return jnp.mean(jnp.square(output - target), axis=tuple(range(1, x0.ndim)))


def drop_conditioning(
    conditioning: Mapping[str, Array], drop: Mapping[str, float], key: Key[Array, " batch"]
) -> dict[str, Array]:
    """Adds `<name>_keep` [B] for every entry that is dropped at times.

    Raises:
        KeyError: an entry is to be dropped that the batch does not have.
    """
    result = dict(conditioning)
    for number, (name, probability) in enumerate(sorted(drop.items())):
        if name not in conditioning:
            raise KeyError(
                f"objective drops conditioning {name!r}; the data has {sorted(conditioning)}"
            )
        if probability:
            keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(key, number)
            draw = jax.vmap(jax.random.uniform)(keys)
            result[f"{name}_keep"] = draw >= probability
    return result


def loss_by_noise(
    example_loss: Float[Array, " batch"], logsnr: Float[Array, " batch"], mask: Any
) -> Metrics:
    """The loss in bins of logsnr: a falling mean hides at which noise level it falls.

    Returns:
        `loss_logsnr/<bin>` -> (sum, count); bins are named by their edges, noisiest first.
    """
    index = jnp.searchsorted(jnp.asarray(NOISE_BIN_EDGES), logsnr, side="right")
    keep = jnp.ones_like(example_loss) if mask is None else mask.astype(example_loss.dtype)
    edges = ["-inf", *(f"{e:+.0f}" for e in NOISE_BIN_EDGES), "+inf"]
    result = {}
    for number, (low, high) in enumerate(itertools.pairwise(edges)):
        inside = (index == number) & (keep > 0)
        total = jnp.sum(jnp.where(inside, example_loss, 0.0))
        result[f"loss_logsnr/{low}..{high}"] = (total, jnp.sum(inside.astype(jnp.float32)))
    return result


def split_keys(key: Key[Array, " batch"], count: int) -> list[Key[Array, " batch"]]:
    """`count` independent keys per example."""
    keys = jax.vmap(lambda k: jax.random.split(k, count))(key)
    return [keys[:, i] for i in range(count)]


def _expand(values: Float[Array, " batch"], like: Array) -> Array:
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))
