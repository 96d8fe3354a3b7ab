"""AdamW against its definition; clipping; groups of rates and of periods."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion_jax.errors import ConfigError
from diffusion_jax.training.optimizer import (
    adamw,
    check_groups,
    every,
    muon,
    rate_groups,
    warmup_schedule,
)


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


def test_stacked_vectors_and_the_objectives_parameters_are_not_decayed():
    params = {
        "blocks": {"kernel": jnp.ones((2, 3, 3)), "bias": jnp.ones((2, 3))},
        "objective": {"uncertainty": {"kernel": jnp.ones((3, 1))}},
    }
    tx = adamw(lambda n: 1.0, weight_decay=0.25, clip_norm=None)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(updates["blocks"]["kernel"], -0.25)
    assert not updates["blocks"]["bias"].any()
    assert not updates["objective"]["uncertainty"]["kernel"].any()


def groups_of(options, **schedule):
    rate = warmup_schedule("constant", 1e-2, steps=100, **schedule)
    return rate, rate_groups(options, rate)


@pytest.mark.parametrize("make", [adamw, muon])
def test_groups_have_rates_and_decays_of_their_own(make):
    """With gradient 0 only the decay moves, by rate times decay."""
    options = {
        "a_slow": {"pattern": "^stem/", "rate": 1e-3},
        "b_free": {"pattern": "/table$", "decay": 0.0},
        "c_late": {"pattern": "stem|out", "decay": 0.5},
    }
    rate, groups = groups_of(options, warmup_steps=2)
    params = {
        name: {leaf: jnp.ones((3, 3))}
        for name, leaf in (("stem", "kernel"), ("label", "table"), ("out", "kernel"), ("fc", "k"))
    }
    check_groups(groups, params)
    tx = make(rate, weight_decay=0.1, clip_norm=None, groups=groups)
    state = tx.init(params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    for warm in (0.5, 1.0, 1.0):
        updates, state = tx.update(zeros, state, params)
        moved = {name: float(tree[next(iter(tree))][0, 0]) for name, tree in updates.items()}
        # `stem` belongs to the first group that fits alone: its own rate, the run's decay.
        expected = {"stem": -1e-4, "label": 0.0, "out": -5e-3, "fc": -1e-3}
        assert moved == pytest.approx({k: warm * v for k, v in expected.items()}, rel=1e-5)


def test_groups_are_clipped_together():
    """A rate group is no optimizer of its own: the global norm is that of all parameters."""
    _, groups = groups_of({"a": {"pattern": "a", "rate": 1.0}})
    tx = adamw(lambda n: 1.0, clip_norm=1.0, b1=0.0, groups=groups)
    params = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    _, state = tx.update(jax.tree.map(lambda p: p + 10.0, params), tx.init(params), params)
    adam = next(s for s in state if isinstance(s, optax.ScaleByAdamState))
    np.testing.assert_allclose(adam.mu["a"], 0.5, rtol=1e-5)


def test_adaptive_clipping_goes_before_the_moments():
    params = {"w": jnp.ones((4, 1))}
    tx = adamw(lambda n: 1.0, clip_norm=None, adaptive_clip=0.1, b1=0.0)
    _, state = tx.update({"w": jnp.full((4, 1), 9.0)}, tx.init(params), params)
    adam = next(s for s in state if isinstance(s, optax.ScaleByAdamState))
    np.testing.assert_allclose(jnp.linalg.norm(adam.mu["w"]), 0.1 * 2.0, rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rate": 1.0}, "parameter_groups.g="),
        ({"pattern": "a", "rates": 1.0}, "parameter_groups.g="),
        ({"pattern": "a(", "rate": 1.0}, "no regular expression"),
        ({"pattern": "a"}, "expected pattern, and rate or decay"),
        ({"pattern": "a", "rate": -1.0}, r"parameter_groups.g.rate=-1.0"),
        ({"pattern": "a", "decay": -0.5}, r"parameter_groups.g.decay=-0.5"),
    ],
)
def test_bad_groups_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        groups_of({"g": fields})


def test_a_group_without_parameters_is_refused():
    params = {"stem": {"kernel": jnp.zeros((2, 2))}}
    for options in (
        {"g": {"pattern": "steem", "rate": 1.0}},
        {"f": {"pattern": ".", "rate": 1.0}, "g": {"pattern": "stem", "decay": 0.1}},
    ):
        with pytest.raises(ConfigError, match=r"parameter_groups.g.pattern=.*stem/kernel"):
            check_groups(groups_of(options)[1], params)
