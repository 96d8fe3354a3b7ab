"""Denoising: the weighted regression that trains every Gaussian diffusion model.

    x_t = alpha(t) x0 + sigma(t) eps,          t from a time sampling, eps ~ N(0, I)       (1)
    loss = E_{x0, t, eps} [ w(t) |f(x_t, t) - target(x0, eps, t)|^2 / dim ]               (2)

The target is the network's declared prediction (x0, eps, v, score, velocity, or the raw output of
an EDM-preconditioned network, Karras et al. 2022, eq. 8); w is the factor that expresses a
weighting in the space of that prediction (`diffusion.weightings`). With some probability the
conditioning of an example is dropped (Ho & Salimans 2022), which classifier-free guidance needs.

Three options change what is minimised, in training alone: noise levels drawn by their loss
(`objectives.adaptive_time`), a learned log-variance u of the noise level
(`objectives.uncertainty`), and alignment with the features of a frozen encoder
(`objectives.alignment`):

    objective = E [ ratio(t) (exp(-u(t)) loss(t) + u(t) + weight alignment(t)) ]          (3)

The metric `loss` is (2) in every case, as under the given time sampling: runs with and without the
options are compared by it.
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
from diffusion_jax.objectives.adaptive_time import AdaptiveTime, Draw
from diffusion_jax.objectives.alignment import Alignment
from diffusion_jax.objectives.base import (
    OBJECTIVE,
    Aux,
    Batch,
    Context,
    Metrics,
    Objective,
    ParameterGroup,
    masked_mean,
    network_params,
)
from diffusion_jax.objectives.uncertainty import Uncertainty

PyTree = Any
NOISE_BIN_EDGES = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)
"""Edges in logsnr between the bins in which the loss is reported."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Denoising:
    """Objective (2). An instance is `objective(params, batch, key, context)`.

    Attributes:
        apply: `(params, x, noise, conditioning, key=) -> output`, the network; for `alignment` it
            also takes `return_features=True` and then returns `(output, features [B, ..., d])`.
        noise_input: what the network wants to know about the noise level.
        schedule: `diffusion.schedules.Schedule`.
        prediction: what the network puts out; "edm" for a preconditioned network.
        sample_time: `(u [B], stratum [B], cells) -> t [B]`, u uniform, the rest from `Context`;
            with stratum 0 and one cell the quantile function of t.
        weight: `(alpha [B], sigma [B]) -> [B]`, factor on the error of the network's output.
        sigma_data: standard deviation of the data, for "edm".
        drop: conditioning name -> probability of replacing it by the network's null embedding.
        adaptive: draws noise levels by their loss; None draws them by `sample_time` alone.
        uncertainty: learned log-variance (3); None for none.
        alignment: alignment with a frozen encoder, as a further term; None for none.
    """

    apply: Callable[..., Any]
    noise_input: str
    schedule: Any
    prediction: str
    sample_time: Callable[[Any, Any, int], Any]
    weight: Callable[[Any, Any], Any]
    sigma_data: float = 0.5
    drop: Mapping[str, float] = dataclasses.field(default_factory=dict)
    adaptive: AdaptiveTime | None = None
    uncertainty: Uncertainty | None = None
    alignment: Alignment | None = None

    def objective(self) -> Objective:
        """This function with its parameters, groups and state, as the engine takes it."""
        return Objective(
            function=self,
            init_params=self.init_params,
            init_extra=self.init_extra,
            groups=tuple(
                ParameterGroup(name=name, pattern=f"^{OBJECTIVE}/{name}/") for name in self._own()
            ),
        )

    def _own(self) -> dict[str, Any]:
        """The parts with parameters of their own."""
        parts = {"uncertainty": self.uncertainty, "alignment": self.alignment}
        return {name: part for name, part in parts.items() if part is not None}

    def init_params(self, key: Key[Array, ""]) -> dict[str, PyTree]:
        """Parameters of the uncertainty and of the alignment's projection."""
        return {name: part.init(key) for name, part in self._own().items()}

    def init_extra(self, params: PyTree) -> dict[str, PyTree]:
        """Statistics of the adaptive time sampling."""
        return {} if self.adaptive is None else {"time": self.adaptive.init()}

    def __call__(
        self, params: PyTree, batch: Batch, key: Key[Array, " batch"], context: Context
    ) -> tuple[Float[Array, ""], Aux]:
        x0, mask = batch["x"], batch.get("mask")
        time_key, noise_key, drop_key, network_key = split_keys(key, 4)
        t, draw, statistics = self._times(jax.vmap(jax.random.uniform)(time_key), context)
        eps = jax.vmap(lambda k: jax.random.normal(k, x0.shape[1:], x0.dtype))(noise_key)
        conditioning = batch.get("conditioning", {})
        if context.training:
            conditioning = drop_conditioning(conditioning, self.drop, drop_key)
        else:
            network_key = None

        error, features = self._squared_error(params, x0, eps, t, conditioning, network_key)
        weighted = self.weight(self.schedule.alpha(t), self.schedule.sigma(t)) * error
        ratio = None if draw is None else draw.ratio
        metrics = {
            "loss": _mean(weighted, ratio, mask),
            "mse": _mean(error, ratio, mask),
            **loss_by_noise(weighted, self.schedule.logsnr(t), mask, ratio),
        }
        own = params.get(OBJECTIVE, {}) if isinstance(params, Mapping) else {}
        total = emphasised = weighted
        if self.uncertainty is not None and context.training:
            # The network's logsnr is clipped alike; it is infinite at the ends of some schedules.
            logsnr = jnp.asarray(denoiser.noise_input("logsnr", self.schedule, t))
            u = self.uncertainty(own["uncertainty"], logsnr)
            emphasised = jnp.exp(-u) * weighted
            total = emphasised + u
            metrics["uncertainty_loss"] = _mean(total, ratio, mask)
        if self.alignment is not None:
            aligned = self.alignment(own["alignment"], features, context.frozen, x0)
            total = total + self.alignment.weight * aligned
            metrics["alignment_loss"] = _mean(aligned, ratio, mask)
        extra = context.extra
        if self.adaptive is not None and draw is not None:
            seen = self.adaptive.observe(statistics, draw.cell, emphasised, mask)
            extra = {**extra, "time": seen}
            total = draw.ratio * total if self.adaptive.reweight else total
        return masked_mean(total, mask)[0], Aux(metrics, extra, total)

    def _times(self, u: Any, context: Context) -> tuple[Any, Draw | None, Any]:
        """Times t [B]; with adaptive sampling also their draw and the statistics it is from."""
        if self.adaptive is None or not context.training:
            return self.sample_time(u, context.stratum, context.cells), None, None
        statistics = self.adaptive.begin(context.extra["time"], context.step)
        draw = self.adaptive.draw(statistics, u, context.stratum, context.cells)
        return self.sample_time(draw.u, jnp.zeros_like(draw.u), 1), draw, statistics

    def _squared_error(
        self, params: PyTree, x0: Any, eps: Any, t: Any, conditioning: Any, key: Any
    ) -> tuple[Float[Array, " batch"], Any]:
        """[B] mean squared error of the network's own output against its target, and the features
        of the network where they are asked for."""
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
        network = network_params(params)
        features = None
        if self.alignment is None:
            output = self.apply(network, inputs, noise, conditioning, key=key)
        else:
            output, features = self.apply(
                network, inputs, noise, conditioning, key=key, return_features=True
            )
        return jnp.mean(jnp.square(output - target), axis=tuple(range(1, x0.ndim))), features


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


def _mean(values: Any, ratio: Any, mask: Any) -> tuple[Any, Any]:
    """(sum, count) of values under the given time sampling, from draws with a density ratio."""
    return masked_mean(values if ratio is None else ratio * values, mask)[1:]


def loss_by_noise(
    example_loss: Float[Array, " batch"],
    logsnr: Float[Array, " batch"],
    mask: Any,
    ratio: Any = None,
) -> Metrics:
    """The loss in bins of logsnr: a falling mean hides at which noise level it falls.

    Args:
        example_loss: [B].
        logsnr: [B], nats.
        mask: [B] True where the example is real, or None.
        ratio: [B] weight of each example in sum and count, or None for 1.

    Returns:
        `loss_logsnr/<bin>` -> (sum, count); bins are named by their edges, noisiest first.
    """
    index = jnp.searchsorted(jnp.asarray(NOISE_BIN_EDGES), logsnr, side="right")
    keep = jnp.ones_like(example_loss) if mask is None else mask.astype(example_loss.dtype)
    edges = ["-inf", *(f"{e:+.0f}" for e in NOISE_BIN_EDGES), "+inf"]
    result = {}
    for number, (low, high) in enumerate(itertools.pairwise(edges)):
        inside = (index == number) & (keep > 0)
        share = inside.astype(jnp.float32) if ratio is None else jnp.where(inside, ratio, 0.0)
        total = jnp.sum(jnp.where(inside, share * example_loss, 0.0))
        result[f"loss_logsnr/{low}..{high}"] = (total, jnp.sum(share))
    return result


def split_keys(key: Key[Array, " batch"], count: int) -> list[Key[Array, " batch"]]:
    """`count` independent keys per example."""
    keys = jax.vmap(lambda k: jax.random.split(k, count))(key)
    return [keys[:, i] for i in range(count)]


def _expand(values: Float[Array, " batch"], like: Array) -> Array:
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))
