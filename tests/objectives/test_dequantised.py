"""A dequantised objective: a uniform density gives uniform values their exact probability, and the
bounds of Gaussian processes give values of a fine grid that of their density."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick

from diffusion_jax.diffusion import schedules, time_grids
from diffusion_jax.diffusion.likelihood import bin_width
from diffusion_jax.diffusion.processes import Gaussian
from diffusion_jax.objectives.base import Aux, Context, masked_mean
from diffusion_jax.objectives.dequantised import Dequantised
from diffusion_jax.objectives.gaussian_bound import GaussianBound
from diffusion_jax.objectives.variational import Variational

COUNT, SHAPE = 17, (4, 3)
WIDTH = bin_width(COUNT)


def uniform_density(params, batch, key, context):
    """-log2 of the density that is constant over [-1 - w/2, 1 + w/2], and 0 outside."""
    x = batch["x"]
    inside = jnp.abs(x) <= 1.0 + 0.5 * WIDTH + 1e-6
    bits = jnp.where(inside, jnp.log2(2.0 + WIDTH), jnp.inf).reshape(len(x), -1)
    loss, total, count = masked_mean(bits.mean(1), batch.get("mask"))
    seen = {"loss": (total, count), "bits_per_example": (total * bits.shape[1], count)}
    # Where in its cell each value has come to lie.
    away = (x - batch["clean"]) / WIDTH
    seen["least"], seen["most"] = ((f(away), 1.0) for f in (jnp.min, jnp.max))
    seen["spread"] = (jnp.var(away), 1.0)
    return loss, Aux(seen, context.extra, bits.mean(1))


def test_bits_of_uniform_values_are_the_logarithm_of_their_number():
    values = np.random.default_rng(0).choice(np.linspace(-1.0, 1.0, COUNT), (64, *SHAPE))
    x = jnp.asarray(values, jnp.float32)
    batch = {"x": x, "clean": x, "mask": jnp.arange(64) < 50}
    context = Context(0, {}, {}, {}, jnp.zeros(64), 64)
    keys = jax.random.split(jax.random.key(1), 64)
    loss, aux = Dequantised(inner=uniform_density, width=WIDTH)({}, batch, keys, context)
    bits = np.log2(COUNT)
    np.testing.assert_allclose(loss, bits, rtol=1e-6)
    np.testing.assert_allclose(aux.example_loss, bits, rtol=1e-6)
    np.testing.assert_allclose(aux.metrics["loss"], (50 * bits, 50), rtol=1e-6)
    np.testing.assert_allclose(aux.metrics["bits_per_example"], (600 * bits, 50), rtol=1e-6)
    # The noise fills each cell evenly and leaves it nowhere.
    assert -0.5001 < aux.metrics["least"][0] < -0.48
    assert 0.48 < aux.metrics["most"][0] < 0.5001
    np.testing.assert_allclose(aux.metrics["spread"][0], 1 / 12, rtol=0.1)


SIZE, DIMS, STD, FINE = 2048, 64, 0.4, 0.05
SCHEDULE = schedules.cosine()


def estimate(params, x_t, t, conditioning, key, schedule=SCHEDULE):
    """E[x0 | x_t] of Gaussian data."""
    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    return alpha * STD**2 * x_t / (alpha**2 * STD**2 + sigma**2)


# Even in logsnr, so that no step has much more of the bound than another.
TIMES = np.append(1.0, np.append(time_grids.uniform_logsnr(SCHEDULE, 126, 0.99, 0.005), 0.0))
BOUNDS = {
    "continuous": GaussianBound(
        estimate=estimate, schedule_of=lambda params: SCHEDULE, first_time=0.005, sigma_data=STD
    ),
    "steps": Variational(estimate=estimate, process=Gaussian(SCHEDULE), times=TIMES),
}


# Steps cost what the kernels lose between them.
@pytest.mark.parametrize(
    ("kind", "least", "most"), [("continuous", -0.07, 0.07), ("steps", 0.25, 0.5)]
)
def test_bits_of_rounded_gaussian_values_are_their_entropy_and_terms_add_up(kind, least, most):
    x = FINE * np.round(STD * np.random.default_rng(0).normal(size=(SIZE, DIMS)) / FINE)
    batch = {"x": jnp.asarray(x, jnp.float32)}
    context = Context(0, {}, {}, {}, jnp.arange(SIZE) / SIZE, SIZE)
    objective = Dequantised(inner=BOUNDS[kind], width=FINE)
    keys = jax.random.split(jax.random.key(1), SIZE)
    loss, aux = quick.jit(lambda keys: objective({}, batch, keys, context))(keys)
    found = {name: float(total / count) for name, (total, count) in aux.metrics.items()}
    example = np.asarray(aux.example_loss)
    np.testing.assert_allclose([found["loss"], example.mean()], loss, rtol=1e-5)
    np.testing.assert_allclose(found["bits_per_example"], DIMS * loss, rtol=1e-5)
    entropy = 0.5 * np.log2(2 * np.pi * np.e * STD**2) - np.log2(FINE)
    assert least < loss - entropy < most
    if kind == "continuous":
        parts = found["prior"] + found["diffusion"] + found["reconstruction"]
        np.testing.assert_allclose(parts, loss, rtol=1e-5)
