"""Runs whose schedule learns step by step: resumed, moved to another mesh, halved, sampled from."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import changed, one_device, shipped

import diffusion_jax
from diffusion_jax import builders, config_rules
from diffusion_jax.data import DataSpec
from diffusion_jax.parallel.mesh import make_mesh

POINTS = DataSpec(shape=(2,), kind="points", range=(-2.0, 2.0))
STEPS = 4


@pytest.fixture(scope="module", autouse=True)
def _quick(quick_programs):
    return None


def get_config(name: str, **changes):
    config = shipped(f"dpm2015_{name}", "smoke")
    changed(config, steps=STEPS, logging__tensorboard=False, **changes)
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = 0
    config_rules.validate(config)
    return config


def swiss_roll(steps=STEPS):
    # Four of five betas are learned, and sharded with the rest.
    small = {"data__points__size": 64, "data__points__held_out": 16, "mesh__fsdp_min_size": 4}
    config = get_config("swiss_roll", **small)
    config.objective.variational.num_steps = 5
    config.steps = steps
    return config


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    with one_device():
        return folder, diffusion_jax.train(swiss_roll(), folder)


@pytest.mark.slow
def test_a_resumed_run_has_the_bits_of_a_whole_one(whole, tmp_path):
    with one_device():
        half = diffusion_jax.train(swiss_roll(STEPS // 2), tmp_path / "run")
        resumed = diffusion_jax.train(swiss_roll(), tmp_path / "run")
    first = builders.schedule(swiss_roll()).params["logits"]
    for state in (half, resumed):
        assert (state.params["schedule"]["logits"] != first).all()
    assert (half.params["schedule"]["logits"] != resumed.params["schedule"]["logits"]).all()
    for a, b in zip(jax.tree.leaves(whole[1]), jax.tree.leaves(resumed), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.slow
def test_a_run_of_one_device_goes_on_with_eight(whole, tmp_path):
    with one_device():
        diffusion_jax.train(swiss_roll(STEPS // 2), tmp_path / "run")
    config = changed(swiss_roll(), mesh__data=2, mesh__fsdp=4)
    moved = diffusion_jax.train(config, tmp_path / "run")
    assert moved.params["schedule"]["logits"].addressable_shards[0].data.size == 1
    for a, b in zip(jax.tree.leaves(whole[1]), jax.tree.leaves(moved), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-5)


def test_betas_stay_float32_under_bfloat16():
    config = swiss_roll()
    config.compute_dtype, config.optimizer.precision = "bfloat16", "masters"
    model = builders.model(config, POINTS)
    params = builders.compiled(config, model, make_mesh()).abstract_state.params
    assert params["schedule"]["logits"].dtype == jnp.float32
    assert any(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(params))
    t = jax.ShapeDtypeStruct((3,), jnp.float32)
    for name in ("alpha", "sigma", "logsnr"):
        level = jax.eval_shape(lambda p, t, n=name: getattr(model.schedule_of(p), n)(t), params, t)
        assert level.dtype == jnp.float32


@pytest.mark.slow
def test_bits_with_a_learned_schedule_are_trained_sampled_from_and_evaluated(tmp_path):
    small = {"data__heartbeat__size": 64, "data__heartbeat__held_out": 20}
    config = get_config("heartbeat", process__binomial__keep="learned", **small)
    config.validation.update(every=2, examples=20)
    with one_device():
        state = diffusion_jax.train(config, tmp_path / "run")
        assert (state.params["schedule"]["logits"] != 0.0).all()
        x = diffusion_jax.load(tmp_path / "run").sample(config.sampling.num, seed=1).x
        found = diffusion_jax.bits_per_dim(tmp_path / "run", method="discrete", steps=4)
    assert x.shape == (config.sampling.num, 20)
    assert set(np.unique(x)) <= {0.0, 1.0}
    assert found.bits.n == 20
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    floors = [r["val/bound_floor_bits"] for r in map(json.loads, rows) if "val/bound_bits" in r]
    # The floor is that of the schedule as it is by then.
    assert len(floors) == 2
    assert floors[0] != floors[1]
