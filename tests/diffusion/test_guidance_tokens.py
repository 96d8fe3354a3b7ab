"""Guidance of tokens by hand: odds of the conditional and the unconditional prediction."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit

from diffusion_jax.diffusion.denoiser import Denoised, Denoiser
from diffusion_jax.diffusion.guidance_tokens import classifier_free_tokens
from diffusion_jax.errors import ConfigError

CONDITIONAL = jnp.array([0.6, 0.3, 0.1])
FREE = jnp.array([0.2, 0.2, 0.6])
X = jnp.zeros((2, 4), jnp.int32)


def constant(p):
    def step(x, t, carry):
        return Denoised(jnp.broadcast_to(p, (*x.shape, len(p)))), carry

    return Denoiser(step)


def guided(weight, t=0.5, **options):
    denoise = classifier_free_tokens(constant(CONDITIONAL), constant(FREE), weight, **options)
    return np.asarray(denoise(X, t).x0)


def test_odds_are_tilted():
    """w = 2: p_c^2 / p_u = .36/.2, .09/.2, .01/.6, which sum to 1.36/.6."""
    expected = np.array([1.8, 0.45, 1.0 / 60.0])
    found = guided(2.0)
    assert found.shape == (2, 4, 3)
    np.testing.assert_allclose(found[1, 3], expected / expected.sum(), rtol=1e-5)
    np.testing.assert_allclose(guided(1.0)[0, 0], CONDITIONAL, rtol=1e-5)
    np.testing.assert_allclose(guided(0.0)[0, 0], FREE, rtol=1e-5)
    traced = jit(
        lambda w: classifier_free_tokens(constant(CONDITIONAL), constant(FREE), w)(X, 0.5).x0
    )
    np.testing.assert_allclose(traced(2.0), found, rtol=1e-5)


def test_times_outside_the_interval_are_conditional():
    for t in (0.1, 0.9, jnp.full(2, 0.9)):
        found = guided(3.0, t, interval=(0.2, 0.8))
        np.testing.assert_allclose(found[0, 0], CONDITIONAL, rtol=1e-5)
    assert np.abs(guided(3.0, 0.8, interval=(0.2, 0.8)) - CONDITIONAL).max() > 0.1


def test_what_is_certain_stays_certain():
    sure = jnp.array([0.0, 1.0, 0.0])
    denoise = classifier_free_tokens(constant(sure), constant(sure), 4.0)
    np.testing.assert_allclose(denoise(X, 0.5).x0[0, 0], sure, atol=1e-6)
    surer = classifier_free_tokens(constant(sure), constant(FREE), 4.0)(X, 0.5).x0[0, 0]
    np.testing.assert_allclose(surer, sure, atol=1e-6)


def test_tokens_take_no_rescale():
    with pytest.raises(ConfigError, match=r"guidance_rescale=0\.5: .*expected 0"):
        guided(2.0, rescale=0.5)
