"""Runs that align their features with a frozen encoder, from the config to the resumed state."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from quick import jit

import diffusion_jax
from diffusion_jax import api, frozen, workdir
from diffusion_jax import config as configs
from diffusion_jax.data import DataSpec
from diffusion_jax.errors import ConfigError
from diffusion_jax.objectives.alignment import FrozenEncoder
from diffusion_jax.objectives.base import Context
from diffusion_jax.parallel.mesh import make_mesh

pytestmark = [pytest.mark.usefixtures("quick_programs"), pytest.mark.slow]

STEPS = 40


def small(**changes):
    """A DiT of two blocks on digits; `a__b=v` sets `config.a.b`."""
    config = configs.base()
    config.data.name, config.network.name = "digits", "dit"
    config.network.dit.update({"dim": 16, "heads": 2, "depth": 2, "patch": 4, "expansion": 1})
    config.steps, config.batch_size = 1, 32
    config.optimizer.update({"warmup_steps": 1, "schedule": "constant", "learning_rate": 3e-3})
    config.logging.update({"tensorboard": False, "every": 1})
    config.validation.examples, config.mesh.fsdp_min_size = 0, 64
    config.sampling.update({"num": 8, "steps": 1, "batch_size": 8})
    return toys.changed(config, **changes)


def aligned(path: Path | str, **changes):
    own = {
        "objective__denoising__alignment__name": "workdir",
        "objective__denoising__alignment__hidden": 32,
        "objective__denoising__alignment__workdir__path": str(path),
        "objective__denoising__alignment__workdir__features_after": 2,
        "network__dit__features_after": 1,
    }
    return small(**{**own, **changes})


def rows(folder: Path, name: str) -> list[float]:
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in read if name in row]


def untrained(config, folder: Path) -> Path:
    """The workdir of a run that saved its first state: random features."""
    run = api.Run.build(config, folder)
    run.save(run.compiled.init(), 0)
    run._saves.close()
    workdir.write_config(folder, run.config, run.model.spec, len(run.train_data), run.train_ids)
    run.held.release()
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return untrained(small(seed=5), tmp_path_factory.mktemp("encoder") / "run")


@pytest.fixture(scope="module")
def trained(encoder, tmp_path_factory):
    """A run that is aligned with it, split over 2 x 4 devices, its encoder too."""
    folder = tmp_path_factory.mktemp("aligned") / "run"
    mesh = {"mesh__data": 2, "mesh__fsdp": 4}
    changes = {"validation__examples": 32, "checkpoint__every": STEPS - 8, **mesh}
    diffusion_jax.train(aligned(encoder, steps=STEPS, **changes), folder)
    return folder


def test_the_features_turn_towards_those_of_the_encoder(trained):
    losses = rows(trained, "train/alignment_loss")
    assert np.mean(losses[-5:]) < np.mean(losses[:3]) - 0.3
    (held_out,) = rows(trained, "val/alignment_loss")
    assert -1.0 <= held_out < np.mean(losses[:3]) - 0.2


def test_the_encoder_is_split_over_the_mesh_and_not_saved(trained, encoder):
    config = workdir.read_config(trained)
    run = api.Run.build(config, trained)
    tree = run.frozen.trees["alignment"]
    kernel = tree["blocks"]["attention"]["qkv"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    stored = run.checkpoints.stored()
    run.checkpoints.close()
    run.held.release()
    assert set(stored["params"]["objective"]["alignment"]) == {"fc1", "fc2", "fc3"}
    assert "frozen" not in stored
    described = json.loads((trained / "config.json").read_text())
    assert described["frozen"] == {"alignment": frozen.hash_of(tree)}
    own = described["config"]["objective"]["denoising"]["alignment"]["workdir"]["path"]
    assert own == str(encoder)


def test_samples_need_no_encoder(trained, tmp_path):
    folder = Path(shutil.copytree(trained, tmp_path / "copy"))
    text = (folder / "config.json").read_text()
    described = json.loads(text)
    described["config"]["objective"]["denoising"]["alignment"]["workdir"]["path"] = "/nowhere"
    (folder / "config.json").write_text(json.dumps(described))
    assert diffusion_jax.load(folder).sample(2).x.shape == (2, 8, 8, 1)


def test_a_resumed_run_ends_with_the_same_bits(trained, encoder, tmp_path):
    """The encoder may lie elsewhere by then: its parameters are what counts."""
    folder = Path(shutil.copytree(trained, tmp_path / "copy"))
    moved = Path(shutil.copytree(encoder, tmp_path / "moved"))
    shutil.rmtree(folder / "checkpoints" / str(STEPS))
    config = workdir.read_config(trained)
    config.objective.denoising.alignment.workdir.path = str(moved)
    state = diffusion_jax.train(config, folder)
    run = api.Run.build(workdir.read_config(trained), trained)
    expected, _ = run.checkpoints.restore(run.compiled.abstract_state)
    run.checkpoints.close()
    run.held.release()
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_another_encoder_is_refused(trained, tmp_path):
    other = untrained(small(seed=6), tmp_path / "other")
    config = workdir.read_config(trained)
    config.objective.denoising.alignment.workdir.path = str(other)
    with pytest.raises(ConfigError) as error:
        api.Run.build(config, trained)
    message = str(error.value)
    assert (
        f"workdir={trained} was made with another frozen encoder (alignment: parameters" in message
    )
    assert "\n" not in message


def linear(params, x0):
    return x0.reshape(x0.shape[0], 4, 16) @ params["kernel"]


@pytest.mark.slow
def test_any_encoder_from_python(tmp_path):
    kernel = np.random.default_rng(0).normal(size=(16, 6)).astype(np.float32)
    given = FrozenEncoder(encode=linear, params={"kernel": kernel}, dim=6)
    config = aligned("", objective__denoising__alignment__name="given", steps=30)
    diffusion_jax.train(config, tmp_path / "run", encoder=given)
    losses = rows(tmp_path / "run", "train/alignment_loss")
    assert np.mean(losses[-5:]) < np.mean(losses[:3]) - 0.1
    other = FrozenEncoder(encode=linear, params={"kernel": kernel + 1.0}, dim=6)
    with pytest.raises(ConfigError, match="another frozen encoder"):
        api.Run.build(config, tmp_path / "run", other)


def test_the_encoder_is_counted_once_a_step(tmp_path):
    def twice(params, x0):
        return linear(params, x0) + linear(params, -x0)

    flops = []
    for encode in (linear, twice):
        given = FrozenEncoder(encode=encode, params={"kernel": np.ones((16, 6), "float32")}, dim=6)
        config = aligned("", objective__denoising__alignment__name="given")
        run = api.Run.build(config, tmp_path / encode.__name__, given)
        run.checkpoints.close()
        run.held.release()
        flops.append(run.flops_per_step(run.abstract_batch(run.loader().batch(0))))
    assert flops[1] - flops[0] == 2 * 32 * 4 * 16 * 6


def test_the_gradient_ends_at_the_encoder(encoder, tmp_path):
    run = api.Run.build(aligned(encoder), tmp_path / "run")
    run.checkpoints.close()
    run.held.release()
    objective, trees = run.compiled.trainer.objective, run.frozen.trees
    local = run.loader().batch(0)
    batch = jax.tree.map(jnp.asarray, {name: local[name] for name in ("x", "conditioning")})
    keys = jax.random.split(jax.random.key(0), 32)
    params = run.compiled.initial_params()

    def found(trees):
        context = Context(jnp.int32(0), {}, {}, trees, jnp.arange(32) / 32, 32)
        loss, aux = objective(params, batch, keys, context)
        return loss, aux.metrics["alignment_loss"][0] / 32

    quickly = jit(found)
    loss, term = quickly(trees)
    slopes = jit(jax.grad(lambda trees: found(trees)[0]))(trees)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(slopes))
    others = quickly(jax.tree.map(lambda a: a + 0.3, trees))
    assert float(others[1]) != float(term)
    # Of the loss it is `weight` times the term and nothing else that the encoder has a say in.
    np.testing.assert_allclose(others[0] - loss, 0.5 * (others[1] - term), atol=1e-5)


def test_the_hash_is_of_values_and_paths_alone():
    tree = {"a": np.arange(8, dtype=np.float32), "b": {"c": np.ones((4, 2), np.float32)}}
    first = frozen.hash_of(tree)
    mesh = make_mesh(data=2, fsdp=4)
    placed = frozen._placed(tree, mesh, 1)
    assert frozen.hash_of(placed) == first
    assert frozen.hash_of({"a": tree["a"], "b": {"d": tree["b"]["c"]}}) != first
    assert frozen.hash_of({"a": tree["a"].reshape(2, 4), "b": tree["b"]}) != first
    tree["a"][3] += 1.0
    assert frozen.hash_of(tree) != first


ALIGNMENT = "objective__denoising__alignment__"
MISTAKES = {
    "no path": ({f"{ALIGNMENT}workdir__path": ""}, ["workdir.path='': expected the workdir"]),
    "no folder": (
        {f"{ALIGNMENT}workdir__path": "/nowhere"},
        ["config.objective.denoising.alignment.workdir.path='/nowhere'", "does not exist"],
    ),
    "no features of its own": (
        {f"{ALIGNMENT}workdir__features_after": None},
        ["network.dit.features_after=0", "alignment.workdir.features_after, up to 2"],
    ),
    "too many blocks": (
        {f"{ALIGNMENT}workdir__features_after": 3},
        ["alignment.workdir.path=", "features_after=3: expected 0 (none) to 2"],
    ),
    "features of the network itself": (
        {"network__dit__features_after": 0},
        ["config.network.dit.features_after=0", "1 to 2"],
    ),
    "a network without features": (
        {"network__name": "unet"},
        ["config.network.name='unet' gives no features", "dit, uvit"],
    ),
    "an encoder that is not given": (
        {f"{ALIGNMENT}name": "given"},
        ["alignment.name='given': no encoder is given", "encoder=..."],
    ),
    "name": ({f"{ALIGNMENT}name": "wrkdir"}, ["alignment.name='wrkdir'", "'workdir'"]),
    "time": ({f"{ALIGNMENT}workdir__time": 1.5}, ["alignment.workdir.time=1.5", "0 to 1"]),
    "width": ({f"{ALIGNMENT}hidden": 0}, ["alignment.hidden=0", "at least 1"]),
    "weight": ({f"{ALIGNMENT}weight": -1.0}, ["alignment.weight=-1.0", "at least 0"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake, encoder, tmp_path):
    changes, words = MISTAKES[mistake]
    with pytest.raises(ConfigError) as error:
        api.Run.build(aligned(encoder, **changes), tmp_path / "run")
    message = str(error.value)
    assert message.startswith("config.")
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (FrozenEncoder(encode=linear, params={"kernel": np.ones((16, 6))}, dim=5), "dim=5: .* 6"),
        (FrozenEncoder(encode=linear, params={"kernel": np.ones((9, 6))}, dim=6), "dot_general"),
        (
            FrozenEncoder(encode=lambda p, x: x.reshape(len(x), 32, 2), params={}, dim=2),
            "the network has 4 tokens and the encoder 32",
        ),
    ],
)
def test_mistakes_of_an_encoder_from_python(given, words, tmp_path):
    config = aligned("", objective__denoising__alignment__name="given")
    with pytest.raises(ConfigError, match=words) as error:
        api.Run.build(config, tmp_path / "run", given)
    assert str(error.value).startswith("config.objective.denoising.alignment")
    assert "\n" not in str(error.value)


def test_an_encoder_that_nobody_asked_for(tmp_path):
    given = FrozenEncoder(encode=linear, params={}, dim=6)
    with pytest.raises(ConfigError, match=r"name='none': an encoder is given; expected 'given'"):
        api.Run.build(small(), tmp_path / "run", given)


def test_an_encoder_of_other_data(encoder):
    config = aligned(encoder)
    spec = DataSpec(shape=(16, 16, 1), kind="image")
    with pytest.raises(ConfigError, match=r"shape \(8, 8, 1\); these have \(16, 16, 1\)"):
        frozen.prepare(config, spec, make_mesh())


def test_an_edm_network_sees_scaled_data(tmp_path):
    """Its inputs have unit variance: clean data are divided by sigma_data."""
    folder = tmp_path / "edm"
    edm = {"process__gaussian__prediction": "edm", "process__gaussian__schedule__name": "edm"}
    untrained(small(network__dit__features_after=2, **edm), folder)
    config = aligned(folder)
    spec = workdir.read_spec(folder)
    part = frozen.prepare(config, spec, make_mesh())
    built = api.builders.model(workdir.read_config(folder), spec)
    x0 = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    level = jnp.full((2,), 20.0)  # logsnr of clean data, as clipped
    params = part.encoder.params
    features = functools.partial(built.network.apply, return_features=True)
    expected = jit(features)(params, x0 / 0.5, level, {})[1]
    np.testing.assert_allclose(jit(part.encoder.encode)(params, x0), expected, rtol=1e-5)
