"""Ancestral sampling of bits, whose exact denoiser is Bayes' rule over the data."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.diffusion import solvers, time_grids
from diffusion_jax.diffusion.processes import Binomial


def test_binomial_ancestral_sampling_reproduces_the_data():
    # Two bits, always equal, ones with probability .7: exact p(x0 | x_t) by Bayes.
    process, count = Binomial(), 4000
    sequences, weights = jnp.array([[0.0, 0.0], [1.0, 1.0]]), jnp.array([0.3, 0.7])

    def denoise(x, t):
        likelihood = jnp.exp(process.marginal(sequences, t).log_prob(x[:, None, :]).sum(-1))
        joint = likelihood * weights
        return (joint / joint.sum(-1, keepdims=True)) @ sequences

    x = process.prior((count, 2)).sample(jax.random.key(0))
    times = time_grids.uniform(100)
    x0 = jax.jit(lambda x: solvers.ancestral(denoise, process, times, x, key=jax.random.key(1)))(x)
    assert set(np.unique(x0)) == {0.0, 1.0}
    assert abs(float(x0.mean()) - 0.7) < 4 * np.sqrt(0.21 / count)
    # Independent bits within a step let few pairs differ.
    assert float((x0[:, 0] != x0[:, 1]).mean()) < 0.02
