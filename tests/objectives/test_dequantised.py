"""A dequantised objective: a uniform density gives uniform values their exact probability."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.diffusion.likelihood import bin_width
from diffusion_jax.objectives.base import Aux, Context, masked_mean
from diffusion_jax.objectives.dequantised import Dequantised

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
    return loss, Aux(seen, context.extra, bits.sum(1))


def test_bits_of_uniform_values_are_the_logarithm_of_their_number():
    values = np.random.default_rng(0).choice(np.linspace(-1.0, 1.0, COUNT), (64, *SHAPE))
    x = jnp.asarray(values, jnp.float32)
    batch = {"x": x, "clean": x, "mask": jnp.arange(64) < 50}
    context = Context(0, {}, {}, {}, jnp.zeros(64), 64)
    keys = jax.random.split(jax.random.key(1), 64)
    loss, aux = Dequantised(inner=uniform_density, width=WIDTH)({}, batch, keys, context)
    bits = np.log2(COUNT)
    np.testing.assert_allclose(loss, bits, rtol=1e-6)
    np.testing.assert_allclose(aux.example_loss, 12 * bits, rtol=1e-6)
    np.testing.assert_allclose(aux.metrics["loss"], (50 * bits, 50), rtol=1e-6)
    np.testing.assert_allclose(aux.metrics["bits_per_example"], (600 * bits, 50), rtol=1e-6)
    # The noise fills each cell evenly and leaves it nowhere.
    assert -0.5001 < aux.metrics["least"][0] < -0.48
    assert 0.48 < aux.metrics["most"][0] < 0.5001
    np.testing.assert_allclose(aux.metrics["spread"][0], 1 / 12, rtol=0.1)
