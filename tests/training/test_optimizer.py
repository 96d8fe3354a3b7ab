"""Schedules at their corners, AdamW against its definition, averages against their sum."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion_jax.training import ema
from diffusion_jax.training.optimizer import adamw, every, warmup_schedule


def test_warmup_rises_linearly_and_cosine_ends_at_its_floor():
    rate = warmup_schedule("cosine", 2.0, steps=110, warmup_steps=10, final_scale=0.1)
    np.testing.assert_allclose([rate(0), rate(4), rate(9), rate(10)], [0.2, 1.0, 2.0, 2.0])
    np.testing.assert_allclose(rate(60), 0.5 * (2.0 + 0.2), rtol=1e-6)
    np.testing.assert_allclose([rate(110), rate(500)], 0.2, rtol=1e-5)
    values = [float(rate(n)) for n in range(10, 111)]
    assert all(a >= b for a, b in itertools.pairwise(values))


def test_constant_stays():
    rate = warmup_schedule("constant", 3.0, steps=100, warmup_steps=2)
    np.testing.assert_allclose([rate(0), rate(1), rate(2), rate(99)], [1.5, 3.0, 3.0, 3.0])


@pytest.mark.parametrize(
    ("name", "warmup", "message"),
    [("cosin", 0, "did you mean 'cosine'"), ("cosine", 200, "optimizer.warmup_steps=200")],
)
def test_bad_schedules_are_refused(name, warmup, message):
    with pytest.raises(ValueError, match=message):
        warmup_schedule(name, 1.0, steps=100, warmup_steps=warmup)


def test_adamw_first_step_is_the_sign_and_decays_matrices_only():
    """At the first step the bias-corrected moments are g and g^2, so the update is rate sign(g)."""
    params = {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full((2,), 3.0)}
    grads = {"kernel": jnp.array([[1e-3, -2.0], [5.0, -0.1]]), "bias": jnp.array([1.0, -1.0])}
    tx = adamw(lambda n: 0.01, eps=1e-12, weight_decay=0.1, clip_norm=None)
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(
        updates["kernel"], -0.01 * (np.sign(grads["kernel"]) + 0.1 * 3.0), rtol=1e-4
    )
    np.testing.assert_allclose(updates["bias"], -0.01 * np.sign(grads["bias"]), rtol=1e-4)


def test_clipping_bounds_what_reaches_the_moments():
    params = {"w": jnp.zeros(4)}
    tx = adamw(lambda n: 1.0, clip_norm=2.0)
    _, state = tx.update({"w": jnp.full(4, 100.0)}, tx.init(params), params)
    adam = next(s for s in state if isinstance(s, optax.ScaleByAdamState))
    np.testing.assert_allclose(jnp.linalg.norm(adam.mu["w"]), 0.1 * 2.0, rtol=1e-5)


def test_every_moves_nothing_between_its_periods():
    tx = every(3, optax.sgd(1.0, momentum=0.5))
    params = jnp.zeros(())
    state, path = tx.init(params), []
    for _ in range(6):
        update, state = tx.update(jnp.ones(()), state, params)
        path.append(float(update))
    assert path == [-1.0, 0.0, 0.0, -1.5, 0.0, 0.0]


def test_average_is_the_weighted_sum_of_all_parameters():
    values = np.random.default_rng(0).normal(size=30)
    tree = {"a": {"w": jnp.asarray(values[0])}}
    for n, value in enumerate(values[1:]):
        tree = ema.update(tree, {"w": jnp.asarray(value)}, n, {"a": 0.8}, warmup=False)
    powers = 0.8 ** np.arange(len(values))[::-1]
    weights = powers * np.where(np.arange(len(values)) == 0, 1.0, 0.2)
    np.testing.assert_allclose(weights.sum(), 1.0)
    np.testing.assert_allclose(tree["a"]["w"], weights @ values, rtol=1e-5)


def test_warmup_forgets_the_start_and_then_keeps_its_length():
    """With d_n = (1+n)/(10+n) the start has the weight prod d_n = 9! n! / (n + 9)! after n + 1."""
    tree, weight = {"a": jnp.ones(())}, 1.0
    for n in range(40):
        tree = ema.update(tree, jnp.zeros(()), n, {"a": 0.9999})
        weight *= (1 + n) / (10 + n)
    np.testing.assert_allclose(tree["a"], weight, rtol=1e-4)
    assert float(ema.decay_at(10**6, 0.99)) == pytest.approx(0.99)
