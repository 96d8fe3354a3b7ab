"""The engine against closed forms and against itself, with objectives that have nothing to do with
diffusion: it has to train anything of the contract's shape."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick import jit

from diffusion_jax.objectives.base import Aux, Objective, ParameterGroup
from diffusion_jax.parallel.mesh import batch_sharding, make_mesh
from diffusion_jax.training.compiled import CompiledTrainer
from diffusion_jax.training.state import position
from diffusion_jax.training.step import Trainer


def linear_objective(params, batch, key, context):
    """Least squares on noisy inputs: the noise makes the result depend on the keys."""
    noise = jax.vmap(lambda k: 0.1 * jax.random.normal(k, batch["x"].shape[1:]))(key)
    inputs = batch["x"] + noise + context.stratum[:, None]
    error = jnp.sum((inputs @ params["w"] - batch["y"]) ** 2, axis=-1)
    count = jnp.float32(len(error))
    return jnp.mean(error), Aux({"mse": (jnp.sum(error), count)}, context.extra, error)


def init_linear(key):
    return {"w": 0.1 * jax.random.normal(key, (4, 3))}


def make_trainer(objective=linear_objective, optimizer=None, **kwargs):
    if not isinstance(objective, Objective):
        objective = Objective(function=objective)
    kwargs = {"init_params": init_linear, "ema_decays": {"default": 0.9}, **kwargs}
    return Trainer(objective=objective, optimizer=optimizer or optax.adam(1e-2), **kwargs)


def make_batch(seed, size=32):
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(size, 4)).astype(np.float32)
    return {"x": x, "y": x[:, :3] * np.float32(2.0)}


def run(trainer, steps=3, size=32, start=None):
    state = trainer.init() if start is None else start
    step = jit(trainer.train_step)
    for n in range(steps):
        state, metrics = step(state, {}, make_batch(n, size))
    return state, metrics


def leaves_equal(a, b):
    return all(
        np.array_equal(np.asarray(x), np.asarray(y))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def test_accumulation_changes_no_noise():
    whole, metrics = run(make_trainer())
    parts, part_metrics = run(make_trainer(accumulation=4))
    np.testing.assert_allclose(whole.params["w"], parts.params["w"], atol=1e-6)
    for name in ("loss", "mse"):
        np.testing.assert_allclose(
            metrics.scalars[name][0] / metrics.scalars[name][1],
            part_metrics.scalars[name][0] / part_metrics.scalars[name][1],
            rtol=1e-5,
        )


def test_noise_depends_on_seed_and_position():
    first = run(make_trainer(), steps=1)[0].params["w"]
    assert not np.array_equal(first, run(make_trainer(seed=1), steps=1)[0].params["w"])
    trainer = make_trainer()
    later = dataclasses.replace(trainer.init(), examples=jnp.array([0, 32], jnp.uint32))
    assert not np.array_equal(first, run(trainer, steps=1, start=later)[0].params["w"])


def test_learns_the_least_squares_solution():
    """With input noise of variance s2 the minimiser is (X'X/n + s2 I)^-1 X'Y/n."""

    def objective(params, batch, key, context):
        noise = jax.vmap(lambda k: 0.5 * jax.random.normal(k, (4,)))(key)
        error = jnp.sum(((batch["x"] + noise) @ params["w"] - batch["y"]) ** 2, axis=-1)
        return jnp.mean(error), Aux({}, context.extra)

    batch = make_batch(0, 512)
    trainer = make_trainer(objective, optax.adam(1e-2), ema_decays={"long": 0.99})
    state, step = trainer.init(), jit(trainer.train_step)
    for _ in range(1500):
        state, _ = step(state, {}, batch)
    gram = batch["x"].T @ batch["x"] / 512 + 0.25 * np.eye(4)
    expected = np.linalg.solve(gram, batch["x"].T @ batch["y"] / 512)
    np.testing.assert_allclose(state.ema["long"]["w"], expected, atol=0.02)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_guard_keeps_everything_but_the_counters(where):
    def objective(params, batch, key, context):
        loss, aux = linear_objective(params, batch, key, context)
        if where == "gradient":
            # sqrt(0) is finite and its gradient is not.
            loss = loss + jnp.sum(jnp.sqrt(params["w"] * 0.0))
        return loss, aux._replace(extra={"seen": context.extra["seen"] + 1.0})

    trainer = make_trainer(
        Objective(function=objective, init_extra=lambda params: {"seen": jnp.zeros(())})
    )
    before = trainer.init()
    batch = make_batch(0)
    if where == "loss":
        batch["x"][5] = np.nan
    after, metrics = jit(trainer.train_step)(before, {}, batch)
    for name in ("params", "ema", "extra"):
        assert leaves_equal(getattr(before, name), getattr(after, name))
    assert leaves_equal(before.opt_state["optimizer"], after.opt_state["optimizer"])
    assert int(after.step) == 1
    assert position(after.examples) == 32
    assert int(after.opt_state["guard"]["skipped"]) == 1
    assert int(after.opt_state["guard"]["consecutive"]) == 1
    assert metrics.scalars["skipped"][0] == 1
    assert metrics.scalars["loss"][1] == 0
    expected = np.arange(32) == 5 if where == "loss" else np.zeros(32, bool)
    np.testing.assert_array_equal(metrics.bad_examples, expected)


def test_guard_counts_start_again_after_a_good_step():
    trainer = make_trainer()
    step = jit(trainer.train_step)
    bad = make_batch(0)
    bad["x"][0, 0] = np.inf
    state = trainer.init()
    for batch in (bad, bad, make_batch(1), bad):
        state, _ = step(state, {}, batch)
    assert int(state.opt_state["guard"]["skipped"]) == 3
    assert int(state.opt_state["guard"]["consecutive"]) == 1
    assert np.isfinite(state.params["w"]).all()


def test_bad_examples_keep_their_place_under_accumulation():
    batch = make_batch(0)
    batch["x"][13] = np.nan
    _, metrics = jit(make_trainer(accumulation=4).train_step)(make_trainer().init(), {}, batch)
    assert np.flatnonzero(metrics.bad_examples).tolist() == [13]


def test_groups_have_their_own_optimizer_and_period():
    def objective(params, batch, key, context):
        loss = jnp.sum(params["generator"]["w"]) + 2.0 * jnp.sum(params["critic"]["w"])
        return loss, Aux({}, context.extra)

    groups = (
        ParameterGroup(name="critic", pattern="^critic/", optimizer=optax.sgd(0.5), period=2),
    )
    trainer = make_trainer(
        Objective(function=objective, groups=groups),
        optax.sgd(0.1),
        init_params=lambda key: {
            "generator": {"w": jnp.zeros(2)},
            "critic": {"w": jnp.zeros(2)},
        },
    )
    state, _ = run(trainer, steps=3)
    np.testing.assert_allclose(state.params["generator"]["w"], -0.3, rtol=1e-6)
    # Updates at steps 0 and 2 of gradient 2 and rate 0.5.
    np.testing.assert_allclose(state.params["critic"]["w"], -2.0, rtol=1e-6)


def test_post_update_has_the_last_word():
    def unit(params, context):
        return jax.tree.map(lambda w: w / jnp.linalg.norm(w), params)

    trainer = make_trainer(Objective(function=linear_objective, post_update=unit))
    state, _ = run(trainer)
    np.testing.assert_allclose(np.linalg.norm(state.params["w"]), 1.0, rtol=1e-6)


def test_frozen_trees_are_arguments():
    def objective(params, batch, key, context):
        error = jnp.mean((params["w"] - context.frozen["teacher"]["w"]) ** 2)
        return error, Aux({}, context.extra)

    trainer = make_trainer(objective, optax.sgd(1.0))
    step = jit(trainer.train_step)
    state = trainer.init()
    for value in (3.0, -1.0):
        teacher = {"teacher": {"w": jnp.full((4, 3), value)}}
        for _ in range(60):
            state, _ = step(state, teacher, make_batch(0))
        np.testing.assert_allclose(state.params["w"], value, atol=1e-3)
    assert step._cache_size() == 1


def test_extra_state_reaches_the_next_step():
    def objective(params, batch, key, context):
        loss, aux = linear_objective(params, batch, key, context)
        return loss, aux._replace(extra=context.extra + jnp.sum(batch["y"]))

    trainer = make_trainer(
        Objective(function=objective, init_extra=lambda params: jnp.zeros(())), accumulation=2
    )
    state, _ = run(trainer, steps=2)
    expected = sum(make_batch(n)["y"].sum() for n in range(2))
    np.testing.assert_allclose(state.extra, expected, rtol=1e-5)


@pytest.mark.parametrize("axes", [(8, 1), (1, 8), (2, 4)])
def test_sharded_step_equals_the_single_device(axes):
    """Parameters over fsdp, batch over both axes: the same numbers, the right shards."""
    trainer = make_trainer(
        init_params=lambda key: {"w": 0.1 * jax.random.normal(key, (64, 8))},
        ema_decays={"default": 0.9},
    )

    def batch(n):
        x = np.random.default_rng(n).normal(size=(32, 64)).astype(np.float32)
        return {"x": x, "y": x[:, :8]}

    single, step = trainer.init(), jit(trainer.train_step)
    mesh = make_mesh(data=axes[0], fsdp=axes[1])
    compiled = CompiledTrainer(trainer, mesh, min_size=16)
    state = compiled.init()
    program = compiled.lower(jax.tree.map(jnp.asarray, batch(0)), {}).compile()
    shape = state.params["w"].addressable_shards[0].data.shape
    assert shape == (64 // axes[1], 8)
    assert state.ema["default"]["w"].addressable_shards[0].data.shape == shape
    for n in range(3):
        single, _ = step(single, {}, batch(n))
        placed = jax.device_put(batch(n), batch_sharding(mesh))
        state, packed, bad = program(state, {}, placed)
    np.testing.assert_allclose(state.params["w"], single.params["w"], atol=1e-6)
    assert packed.shape == (len(compiled.metric_names(placed, {})), 2)
    assert not np.asarray(bad).any()


def test_guard_sees_a_nan_that_only_the_update_has():
    """Adam with eps = 0 divides 0 by 0 for a gradient of 0, while loss and gradients are finite."""

    def objective(params, batch, key, context):
        return jnp.sum(params["w"][:1] ** 2), Aux({}, context.extra)

    trainer = make_trainer(objective, optax.adam(1e-2, eps=0.0))
    before = trainer.init()
    after, metrics = jit(trainer.train_step)(before, {}, make_batch(0))
    assert leaves_equal(before.params, after.params)
    assert metrics.scalars["skipped"][0] == 1
