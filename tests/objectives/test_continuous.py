"""The bound of masked diffusion in continuous time against entropies that are known."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit

from diffusion_jax.diffusion.processes import KEEPS, Masked
from diffusion_jax.objectives.base import Context
from diffusion_jax.objectives.continuous import Continuous

SIZE, K = 16_384, 4
CHANCE = np.array([0.5, 0.25, 0.125, 0.125])
BITS = 1.75


def evaluate(objective, x, mask=None, training=False):
    keys = jax.random.split(jax.random.key(0), len(x))
    strata = jnp.arange(len(x)) / len(x)
    context = Context(jnp.int32(0), {}, {}, {}, strata, len(x), training)
    batch = {"x": x} if mask is None else {"x": x, "mask": mask}
    return jit(lambda batch, keys: objective({}, batch, keys, context))(batch, keys)


@pytest.mark.parametrize("keep", KEEPS.values(), ids=list(KEEPS))
def test_two_equal_tokens_have_the_entropy_of_one(keep):
    """The second token follows the first, which has 1.75 bits: by the exact prediction the bound is
    1.75 bits an example, half of it a token."""
    process = Masked(K, keep)
    x = np.random.default_rng(0).choice(K, SIZE, p=CHANCE).astype(np.int32)
    x = jnp.asarray(np.stack([x, x], axis=1))

    def estimate(params, x_t, t, conditioning, key):
        other = x_t[:, ::-1, None]
        return jnp.where(other == K, CHANCE, 1.0 * (other == jnp.arange(K)))

    loss, aux = evaluate(Continuous(estimate=estimate, process=process), x)
    error = 2 * np.std(np.asarray(aux.example_loss)) / np.sqrt(SIZE)
    assert error < 0.05
    assert abs(2 * float(loss) - BITS) < 4 * error
    np.testing.assert_allclose(aux.metrics["bits_per_example"][0] / SIZE, 2 * loss, rtol=1e-5)

    def independent(params, x_t, t, conditioning, key):
        return jnp.broadcast_to(CHANCE, (*x_t.shape, K))

    worse, aux = evaluate(Continuous(estimate=independent, process=process), x)
    error = 2 * np.std(np.asarray(aux.example_loss)) / np.sqrt(SIZE)
    assert abs(2 * float(worse) - 2 * BITS) < 4 * error


def test_padding_counts_for_nothing_and_labels_are_dropped_in_training():
    seen = {}

    def estimate(params, x_t, t, conditioning, key):
        seen["key"] = key
        return jnp.full((*x_t.shape, K), 0.25)

    objective = Continuous(estimate=estimate, process=Masked(K))
    x = jnp.zeros((64, 3), jnp.int32)
    mask = jnp.arange(64) < 32
    loss, aux = evaluate(objective, x, mask)
    assert float(aux.metrics["loss"][1]) == 32.0
    assert seen["key"] is None
    np.testing.assert_allclose(float(loss), aux.example_loss[:32].mean(), rtol=1e-5)
    evaluate(objective, x, training=True)
    assert seen["key"] is not None
