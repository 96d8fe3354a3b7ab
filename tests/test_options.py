"""Options that no config turns on, all at once through the door: what each leaves behind."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import diffusion_jax
from diffusion_jax import workdir
from diffusion_jax.api import Run

pytestmark = pytest.mark.usefixtures("quick_programs")

CLIP_NORM = 1e-3
PLAIN = (
    "--config=configs/toy2d.py:smoke",
    "--config.steps=5",
    "--config.compute_dtype=float32",
    "--config.logging.tensorboard=False",
    "--config.logging.every=1",
    "--config.validation.examples=20",
)
OPTIONS = (
    "--config.compute_dtype=bfloat16",
    "--config.checkpoint.every=1",
    "--config.checkpoint.keep_last=1",
    "--config.checkpoint.keep_every=2",
    "--config.logging.profile_at=2",
    "--config.logging.profile_steps=2",
    "--config.deterministic",
    "--config.ema.decays.long=0.5",
    "--config.ema.warmup=False",
    "--config.sampling.ema=long",
    "--config.validation.batch_size=8",
    "--config.accumulation=2",
    f"--config.optimizer.clip_norm={CLIP_NORM}",
)


@pytest.fixture(scope="module")
def runs(start_door, tmp_path_factory) -> dict[str, tuple[Path, str]]:
    """A plain run and one with every option: (folder, standard error) by name."""
    root = tmp_path_factory.mktemp("options")
    started = {
        name: (root / name, start_door("main", f"--workdir={root / name}", *PLAIN, *more))
        for name, more in (("plain", ()), ("all", OPTIONS))
    }
    found = {}
    for name, (folder, door) in started.items():
        code, _, err = door.wait(180)
        assert code == 0, err
        found[name] = folder, err
    return found


@pytest.fixture(scope="module")
def built(runs):
    """The run with every option and its last state."""
    folder = runs["all"][0]
    run = Run.build(workdir.read_config(folder), folder)
    state, _ = run.checkpoints.restore(run.compiled.abstract_state)
    yield run, state
    run.checkpoints.close()


def rows(folder: Path, name: str) -> dict[int, float]:
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[name] for row in read if name in row}


def test_accumulation_changes_no_noise(runs, built):
    assert built[0].compiled.trainer.accumulation == 2
    # Before its first update the network answers 0 in any precision: only data and noise count.
    plain, both = (rows(runs[name][0], "train/loss")[1] for name in ("plain", "all"))
    assert both == pytest.approx(plain, rel=1e-6)


def test_the_network_computes_in_bfloat16_and_is_kept_in_float32(built):
    run, state = built
    assert run.config.compute_dtype == "bfloat16"
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((state.params, state.ema)))
    x, t = jnp.zeros((2, *run.model.spec.shape)), jnp.full((2,), 0.5)
    traced = jax.make_jaxpr(lambda params: run.model.network.apply(params, x, t, {}))(state.params)
    products = [eqn for eqn in traced.eqns if eqn.primitive.name == "dot_general"]
    assert products
    assert {str(eqn.invars[0].aval.dtype) for eqn in products} == {"bfloat16"}


def test_checkpoints_that_are_kept(runs):
    kept = {path.name for path in (runs["all"][0] / "checkpoints").iterdir()}
    assert {int(name) for name in kept if name.isdigit()} == {2, 4, 5}


def test_a_profile_of_its_window(runs):
    folder, err = runs["all"]
    assert f"profile of steps 2..3 is in {folder}/plugins" in err
    assert [path.stat().st_size > 0 for path in folder.glob("plugins/profile/*/*.xplane.pb")] == [
        True
    ]


def test_deterministic_reaches_the_compiler(built):
    assert built[0].compiled._options()["xla_gpu_deterministic_ops"] is True


def test_two_averages_and_the_one_that_is_sampled(runs, built):
    folder, (_, state) = runs["all"][0], built
    assert set(state.ema) == {"default", "long"}
    loaded = jax.tree.leaves(diffusion_jax.load(folder).params)
    for one, long, default in zip(
        loaded, *(jax.tree.leaves(state.ema[name]) for name in ("long", "default")), strict=True
    ):
        np.testing.assert_array_equal(one, long)
        assert not np.array_equal(long, default) or not np.any(long)
    losses = [rows(folder, f"val/loss{suffix}")[5] for suffix in ("", "_ema", "_ema_long")]
    assert len(set(losses)) == 3


def test_the_size_of_a_validation_batch_changes_no_loss(runs, built):
    run, state = built
    shown = rows(runs["all"][0], "val/loss_ema_long")[5]
    config = run.config.copy_and_resolve_references()
    for size in (8, 24):
        config.validation.batch_size = size
        again = dataclasses.replace(run, config=config)._validate(state, 5)
        assert again["val/loss_ema_long"] == pytest.approx(shown, rel=1e-4)


def test_the_gradient_is_clipped_before_the_optimizer(runs, built):
    norms = rows(runs["all"][0], "train/grad_norm")
    assert min(norms.values()) > 10 * CLIP_NORM
    moments = optax.tree.get(built[1].opt_state, "mu")
    assert 0 < float(optax.tree.norm(moments)) <= CLIP_NORM
