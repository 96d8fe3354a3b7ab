"""Options of the optimisation through the whole trainer: saved, resumed, moved to another mesh."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import api, builders, config_rules
from diffusion_jax import config as configs
from diffusion_jax.parallel.arrays import global_batch

pytestmark = pytest.mark.usefixtures("quick_programs")

OPTIONS = {
    "muon, masters, groups, cool-down, power averages": {
        "optimizer__name": "muon",
        "optimizer__precision": "masters",
        "optimizer__schedule": "inverse_sqrt",
        "optimizer__cooldown_steps": 1,
        "optimizer__muon__weight_decay": 0.1,
        "parameter_groups__head": {"pattern": "^head/", "rate": 1e-4},
        "parameter_groups__noise": {"pattern": "noise", "decay": 0.0},
        "ema__powers__short": 0.05,
        "ema__powers__long": 0.2,
        "sampling__ema": "short",
    },
    "stochastic rounding, adaptive clipping, adaptive times, uncertainty": {
        "optimizer__precision": "stochastic",
        "optimizer__adaptive_clip": 0.1,
        "objective__denoising__adaptive__name": "loss",
        "objective__denoising__uncertainty__name": "mlp",
        "accumulation": 2,
    },
}


def small(**changes):
    """An MLP of one block on points; `a__b=v` sets `config.a.b`, new names too."""
    config = configs.base()
    config.data.name, config.network.name = "points", "mlp"
    config.network.mlp.update({"width": 16, "depth": 1})
    config.steps, config.batch_size, config.optimizer.warmup_steps = 3, 16, 1
    config.sampling.update({"num": 8, "steps": 1})
    config.mesh.update({"data": 2, "fsdp": 4, "fsdp_min_size": 16})
    for path, value in changes.items():
        *parents, key = path.split("__")
        section = config
        for parent in parents:
            section = section[parent]
        with section.unlocked():
            section[key] = value
    return config


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), jax.tree_util.keystr(path)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_a_run_goes_on_from_its_save_on_any_mesh(name, tmp_path):
    config = small(**OPTIONS[name])
    # As from the file of a workdir.
    config = configs.from_json(configs.to_json(config))
    config_rules.validate(config)
    run = api.Run.build(config, tmp_path / "run")
    batches = [global_batch(run.loader().batch(16 * n), run.compiled.mesh) for n in range(3)]
    step = run.compiled.lower(run.abstract_batch(run.loader().batch(0)), {}).compile()

    state = run.compiled.init()
    first = jax.tree.map(np.asarray, state.params)
    for number, batch in enumerate(batches, start=1):
        if number == 3:
            run.save(state, 2)
        state, packed, _ = step(state, {}, batch)
        assert np.isfinite(np.asarray(packed)).all()
    run._saves.wait()
    moved = jax.tree.map(lambda a, b: np.any(a != np.asarray(b)), first, state.params)
    assert moved["head"]["kernel"]

    middle, _ = run.checkpoints.restore(run.compiled.abstract_state)
    again, _, _ = step(middle, {}, batches[2])
    assert_same_bits(again, state)

    middle, _ = run.checkpoints.restore(run.compiled.abstract_state)
    config.mesh.data, config.mesh.fsdp = 8, 1
    other = builders.compiled(config, run.model, builders.mesh(config))
    assert_same_bits(run.checkpoints.restore(other.abstract_state)[0], middle)
    run._saves.close()
    run.held.release()
    sharded = [a for a in jax.tree.leaves(middle) if not a.is_fully_replicated]
    assert {jnp.dtype(a.dtype) for a in sharded} >= {jnp.dtype("float32")}


def test_a_group_of_its_own_rate_and_a_decay_of_none(tmp_path):
    """Through the builders: the head moves by its own rate alone."""
    moved = {}
    for rate in (0.0, 1.0):
        group = {"pattern": "^head/", "rate": rate}
        config = small(parameter_groups__head=group, optimizer__clip_norm=0.0)
        built = builders.model(config, builders.source(config, "train").spec)
        optimizer = builders.trainer(config, built).optimizer
        params = {"head": {"kernel": jnp.ones((2, 2))}, "stem": {"kernel": jnp.ones((2, 2))}}
        update, _ = optimizer.update(params, optimizer.init(params), params)
        moved[rate] = jax.tree.map(lambda a: float(jnp.abs(a).max()), update)
    assert moved[0.0]["head"]["kernel"] == 0.0
    assert moved[1.0]["head"]["kernel"] == pytest.approx(1.0, rel=1e-3)
    assert moved[0.0]["stem"] == moved[1.0]["stem"]
