"""The learned log-variance finds the logarithm of the loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from quick import jit

from diffusion_jax.objectives.uncertainty import Uncertainty


def test_it_starts_as_the_plain_loss():
    part = Uncertainty()
    u = part(part.init(jax.random.key(0)), jnp.linspace(-20, 20, 9))
    np.testing.assert_array_equal(u, 0.0)


def test_its_optimum_is_the_logarithm_of_the_mean_loss():
    """Losses of chi-square shape around a known mean that spans three orders of magnitude."""
    part = Uncertainty()

    def mean(logsnr):
        return jnp.exp(-0.5 * logsnr + jnp.sin(logsnr))

    def loss(params, key):
        where, noise = jax.random.split(key)
        logsnr = jax.random.uniform(where, (512,), minval=-6.0, maxval=6.0)
        losses = mean(logsnr) * jax.random.gamma(noise, 4.0, (512,)) / 4.0
        u = part(params, logsnr)
        return jnp.mean(jnp.exp(-u) * losses + u)

    params = part.init(jax.random.key(0))
    tx = optax.adam(optax.linear_schedule(0.1, 0.0, 1500))

    @jit
    def run(params):
        def body(carry, key):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params, key), state)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(jax.random.key(1), 1500)
        return jax.lax.scan(body, (params, tx.init(params)), keys)[0][0]

    logsnr = jnp.linspace(-5.5, 5.5, 45)
    u = part(run(params), logsnr)
    np.testing.assert_allclose(u, jnp.log(mean(logsnr)), atol=0.1)
