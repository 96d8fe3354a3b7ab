"""The one-step estimate of the bound against the exact bound, for both processes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit, normal

from diffusion_jax.data.heartbeat import heartbeat_sequences
from diffusion_jax.diffusion import likelihood, schedules, time_grids
from diffusion_jax.diffusion.processes import Binomial, Gaussian, learned_keep
from diffusion_jax.objectives.base import Context
from diffusion_jax.objectives.variational import Variational

SIZE = 8192


def evaluate(objective, x, seed=0):
    keys = jax.random.split(jax.random.key(seed), len(x))
    context = Context(jnp.int32(0), {}, {}, {}, jnp.arange(len(x)) / len(x), len(x))
    return jit(lambda x, keys: objective({}, {"x": x}, keys, context))(x, keys)


def test_heartbeat_with_exact_marginals_meets_the_exact_bound():
    """x0_hat = p(x0 = 1 | x_t) by enumerating the five sequences; the bound likewise."""
    sequences, process, times = heartbeat_sequences(), Binomial(), time_grids.uniform(20)

    def estimate(params, x_t, t, conditioning, key):
        keep = (1.0 - t)[:, None, None]
        one = keep * sequences + 0.5 * (1.0 - keep)
        chance = jnp.where(x_t[:, None] > 0.5, one, 1.0 - one)
        posterior = jax.nn.softmax(jnp.sum(jnp.log(jnp.maximum(chance, 1e-30)), axis=-1))
        return posterior @ sequences

    x = jnp.asarray(np.resize(sequences, (SIZE, 20)))
    objective = Variational(estimate=estimate, process=process, times=times)
    loss, aux = evaluate(objective, x)
    exact = likelihood.factorised_bound(sequences, process, times) / np.log(2.0)
    standard_error = 20 * np.std(np.asarray(aux.example_loss)) / np.sqrt(SIZE)
    assert abs(float(loss) * 20 - exact) < 4 * standard_error
    assert exact - np.log2(5) < 0.3
    np.testing.assert_allclose(aux.metrics["bits_per_example"][0] / SIZE, 20 * loss, rtol=1e-5)


def test_gaussian_with_the_exact_denoiser_meets_the_sum_of_all_steps():
    process, times = Gaussian(schedules.linear_beta()), time_grids.uniform(10)
    schedule = process.schedule

    def estimate(params, x_t, t, conditioning, key):
        alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
        return alpha * 0.25 * x_t / (alpha**2 * 0.25 + sigma**2)

    x = 0.5 * normal(SIZE, 3, seed=5)
    loss, aux = evaluate(Variational(estimate=estimate, process=process, times=times), x)

    def denoise(x_t, t):
        return estimate({}, x_t, jnp.broadcast_to(t, x_t.shape[:1]), {}, None)

    bound = likelihood.variational_bound(denoise, process, times, x, key=jax.random.key(9))
    standard_error = 3 * np.std(np.asarray(aux.example_loss)) / np.sqrt(SIZE)
    expected = float(jnp.mean(bound.total)) / np.log(2.0)
    assert abs(float(loss) * 3 - expected) < 4 * standard_error


@pytest.mark.slow
def test_a_learned_schedule_of_bits_follows_the_gradient_of_the_exact_bound():
    """The states are bits, which no gradient passes through; the bound is that of all of them,
    enumerated, by finite differences. At the exact marginals it does not depend on x0_hat."""
    sequences, steps = np.array([[0, 0, 1], [1, 1, 0], [1, 0, 0]], np.float32), 4
    times, logits = time_grids.uniform(steps), np.array([0.5, -0.4, 0.3, -0.2])
    start = learned_keep(steps).with_params({"logits": logits})

    def process_of(params):
        return Binomial(start.with_params(params))

    def estimate(params, x_t, t, conditioning, key):
        one = Binomial(start).marginal(jnp.broadcast_to(sequences, (len(t), *sequences.shape)), t)
        chance = jnp.where(x_t[:, None] > 0.5, one.mean, 1.0 - one.mean).prod(-1)
        return chance / chance.sum(-1, keepdims=True) @ sequences

    objective = Variational(
        estimate=estimate, process=Binomial(start), process_of=process_of, times=times
    )
    x = jnp.asarray(np.resize(sequences, (SIZE, 3)))
    context = Context(jnp.int32(0), {}, {}, {}, jnp.arange(SIZE) / SIZE, SIZE)

    def gradient(key):
        keys = jax.random.split(key, SIZE)

        def loss(logits):
            return objective({"logits": logits}, {"x": x}, keys, context)[0]

        return jax.value_and_grad(loss)(jnp.asarray(logits, jnp.float32))

    values, gradients = jax.jit(lambda keys: jax.lax.map(gradient, keys))(
        jax.random.split(jax.random.key(4), 32)
    )

    def exact(logits):
        nats = likelihood.factorised_bound(sequences, process_of({"logits": logits}), times)
        return nats / np.log(2.0) / 3

    moves = 1e-5 * np.eye(steps)
    expected = np.array([(exact(logits + e) - exact(logits - e)) / 2e-5 for e in moves])
    mean, error = np.mean(gradients, 0), np.std(gradients, 0) / np.sqrt(32)
    assert (error < 0.05 * np.abs(expected).max()).all()
    np.testing.assert_array_less(np.abs(mean - expected), 4 * error)
    assert abs(np.mean(values) - exact(logits)) < 4 * np.std(values) / np.sqrt(32)
