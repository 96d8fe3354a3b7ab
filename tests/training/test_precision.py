"""Rounding by chance: exact where it can be, right on average elsewhere; masters; resuming."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick import jit

from diffusion_jax.errors import ConfigError
from diffusion_jax.objectives.base import Aux, Objective
from diffusion_jax.training.precision import Precision, round_stochastically
from diffusion_jax.training.step import Trainer


def test_what_bfloat16_represents_stays():
    values = jnp.array([0.0, -0.0, 1.0, -1.5, 3.140625, 2.0**-130, 1e38, jnp.inf, -jnp.inf])
    exact = values.astype(jnp.bfloat16).astype(jnp.float32)
    for seed in range(20):
        rounded = round_stochastically(exact, jax.random.key(seed)).astype(jnp.float32)
        np.testing.assert_array_equal(rounded, exact)
        assert np.array_equal(np.signbit(rounded), np.signbit(exact))


def test_a_nan_stays_a_nan():
    bits = jnp.array([0x7FC00000, 0x7F800001, 0xFFFFFFFF, 0x7FFFFFFF], jnp.uint32)
    nans = jax.lax.bitcast_convert_type(bits, jnp.float32)
    for seed in range(20):
        rounded = np.asarray(round_stochastically(nans, jax.random.key(seed)), np.float32)
        # Quiet or not, no number and no infinity may come of it.
        assert np.isnan(rounded[[0, 2, 3]]).all()
        assert not np.isfinite(rounded).any()


def test_rounding_goes_to_a_neighbour_and_is_right_on_average():
    values = jnp.array([1.0 + 0.3 / 128, -2.0 - 0.9 / 64, 1e-3, 0.7, -123.4])
    draws = np.asarray(
        jax.vmap(lambda k: round_stochastically(values, k))(
            jax.random.split(jax.random.key(1), 40000)
        ),
        np.float64,
    )
    exact = np.asarray(values, np.float64)
    for column, value in zip(draws.T, exact, strict=True):
        found = np.unique(column)
        assert len(found) == 2
        assert found[0] < value < found[1]
        # Its chance is linear between the neighbours.
        share = (value - found[0]) / (found[1] - found[0])
        error = np.sqrt(share * (1 - share) / len(column))
        assert abs(np.mean(column == found[1]) - share) < 4.5 * error


def test_small_updates_come_to_pass_now_and_then():
    """1 less 1e-4 is 1 in bfloat16; a thousand such updates are 0.9 on average."""
    trainers = {name: constant_gradient(name) for name in ("float32", "masters", "stochastic")}
    ends = {}
    for name, trainer in trainers.items():
        state, step = trainer.init(), jit(trainer.train_step)
        for _ in range(300):
            state, _ = step(state, {}, {"x": jnp.zeros((2, 1))})
        ends[name] = state
    w = np.asarray(ends["stochastic"].params["w"], np.float64)
    assert ends["stochastic"].params["w"].dtype == jnp.bfloat16
    # Each step rounds with a spread of at most half a unit in the last place, 2^-8 below 1.
    standard_error = np.sqrt(300 * 1e-4 * 2.0**-8) / np.sqrt(w.size)
    assert abs(w.mean() - 0.97) < 5 * standard_error
    np.testing.assert_allclose(ends["float32"].params["w"], 0.97, rtol=1e-4)
    masters = ends["masters"]
    np.testing.assert_array_equal(masters.opt_state["masters"]["w"], ends["float32"].params["w"])
    np.testing.assert_array_equal(
        masters.params["w"], ends["float32"].params["w"].astype(jnp.bfloat16)
    )
    # Averages are float32 and follow what lies under the rounding.
    np.testing.assert_array_equal(masters.ema["default"]["w"], ends["float32"].ema["default"]["w"])
    assert ends["stochastic"].ema["default"]["w"].dtype == jnp.float32


def constant_gradient(precision):
    def objective(params, batch, key, context):
        loss = jnp.sum(params["w"].astype(jnp.float32)) + jnp.sum(params["b"])
        return loss, Aux({}, context.extra)

    return Trainer(
        objective=Objective(function=objective),
        init_params=lambda key: {"w": jnp.ones((64, 64)), "b": jnp.ones(64)},
        optimizer=optax.sgd(1e-4),
        ema_decays={"default": 0.9},
        precision=Precision(precision),
    )


def test_vectors_and_the_objectives_parameters_stay_float32():
    tree = {
        "blocks": {"kernel": jnp.ones((2, 3, 3)), "bias": jnp.ones((2, 3))},
        "norm": {"scale": jnp.ones(3)},
        "objective": {"alignment": {"kernel": jnp.ones((3, 3))}},
    }
    for name in ("masters", "stochastic"):
        stored = Precision(name).stored(tree, jax.random.key(0))
        kinds = jax.tree.map(lambda a: a.dtype.name, stored)
        assert kinds["blocks"] == {"kernel": "bfloat16", "bias": "float32"}
        assert kinds["norm"]["scale"] == kinds["objective"]["alignment"]["kernel"] == "float32"
    assert Precision("masters", keep=".").stored(tree, jax.random.key(0)) == tree


def test_a_parameters_rounding_depends_on_seed_step_and_path_alone():
    w = jnp.full((32, 32), 1.001)
    key = jax.random.key(7)
    rounding = Precision("stochastic")
    alone = rounding.stored({"a": {"w": w}}, key)["a"]["w"]
    among = rounding.stored({"_": {"w": w}, "a": {"v": w, "w": w}, "b": {"w": w}}, key)
    np.testing.assert_array_equal(alone, among["a"]["w"])
    for other in (among["a"]["v"], among["b"]["w"]):
        assert not np.array_equal(alone, other)
    later = rounding.stored({"a": {"w": w}}, jax.random.key(8))["a"]["w"]
    assert not np.array_equal(alone, later)


def test_steps_round_differently():
    """The same update at two steps: were the key the same, rounding errors would add up."""
    trainer = constant_gradient("stochastic")
    state, step = trainer.init(), jit(trainer.train_step)
    moved = []
    for _ in range(2):
        before = np.asarray(state.params["w"], np.float32)
        state, _ = step(state, {}, {"x": jnp.zeros((2, 1))})
        moved.append(np.asarray(state.params["w"], np.float32) != before)
    assert moved[0].any()
    assert not np.array_equal(*moved)


def test_unknown_precision_is_refused():
    with pytest.raises(ConfigError, match=r"optimizer.precision='stochastc'.*'stochastic'"):
        Precision("stochastc")
