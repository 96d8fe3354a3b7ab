"""Which weights are sampled: by name, and of a length that nobody tracked, after the fact."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import diffusion_jax
from diffusion_jax import averages, builders, workdir
from diffusion_jax import config as configs
from diffusion_jax.checkpoints import Checkpointer
from diffusion_jax.errors import ConfigError
from diffusion_jax.parallel.mesh import make_mesh
from diffusion_jax.training import ema
from diffusion_jax.training.state import TrainState

pytestmark = pytest.mark.usefixtures("quick_programs")

COUNT, SIZE = 1000, 64
POWERS = {"long": 0.10, "short": 0.05}


def trajectory() -> np.ndarray:
    """[updates, size] parameters that move as training does: far first, then around a place."""
    i = np.arange(1, COUNT + 1)[:, None]
    k = np.arange(SIZE)[None]
    return np.cos(0.1 * k) * (1.0 - (i / COUNT) ** 0.7) + np.sin(0.01 * i * (1 + k % 5)) / 4


def power_average(path: np.ndarray, updates: int, sigma_rel: float) -> np.ndarray:
    """The sum over the profile itself, equation (2) of `training.ema`, in float64."""
    edges = (np.arange(updates + 1) / updates) ** (ema.gamma_of(sigma_rel) + 1.0)
    return np.diff(edges) @ path[:updates]


def abstract(sharding=None) -> TrainState:
    leaf = {"w": jax.ShapeDtypeStruct((SIZE,), jnp.float32, sharding=sharding)}
    return TrainState(
        step=None,
        examples=None,
        params=leaf,
        opt_state=None,
        ema={name: leaf for name in ("default", *POWERS)},
        extra=None,
    )


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Checkpoints of that trajectory, every 100 updates; four updates were skipped before them."""
    folder, path = tmp_path_factory.mktemp("stored") / "c", trajectory()
    with Checkpointer(folder, keep_last=100) as checkpoints:
        for t in range(100, COUNT + 1, 100):
            trees = {name: power_average(path, t, width) for name, width in POWERS.items()}
            state = {
                "params": {"w": jnp.asarray(path[t - 1], jnp.float32)},
                "ema": {
                    name: {"w": jnp.asarray(tree, jnp.float32)}
                    for name, tree in {**trees, "default": path[t - 1] + 1.0}.items()
                },
                "opt_state": {"guard": {"skipped": jnp.int32(4)}},
            }
            checkpoints.save(t + 4, state, {})
            checkpoints.wait()
    return folder


def weights(folder, sharding=None, **options):
    options = {"name": "default", "powers": POWERS, **options}
    with Checkpointer(folder, read_only=True) as checkpoints:
        return averages.stored_weights(checkpoints, abstract(sharding), **options)["w"]


@pytest.mark.parametrize(("length", "share"), [(0.04, 0.1), (0.075, 0.03), (0.12, 0.1), (0.2, 0.1)])
def test_any_length_against_the_sum_over_its_profile(stored, length, share):
    """Many times nearer than the better one of the two lengths that were tracked."""
    path, lines = trajectory(), []
    found = np.asarray(weights(stored, length=length, note=lines.append))
    expected = power_average(path, COUNT, length)
    tracked = [power_average(path, COUNT, width) for width in POWERS.values()]
    nearest = min(np.abs(other - expected).max() for other in tracked)
    assert np.abs(found - expected).max() < share * nearest
    (line,) = lines
    assert line.startswith(f"ema_length={length}: ")
    assert "of 20 stored averages" in line
    assert "at 1000)" in line


def test_a_tracked_length_is_the_stored_one(stored):
    lines = []
    found = weights(stored, length=0.05, note=lines.append)
    np.testing.assert_array_equal(found, weights(stored, name="short"))
    assert "1 of 20 stored averages: +1 x (length 0.05 at 1000)" in lines[0]


def test_names_and_raw_weights(stored):
    path = trajectory()[-1]
    np.testing.assert_allclose(weights(stored, name="default"), path + 1.0, rtol=1e-6)
    np.testing.assert_allclose(weights(stored, name=""), path, atol=1e-6)
    long = power_average(trajectory(), COUNT, 0.10)
    np.testing.assert_allclose(weights(stored, name="long"), long, atol=1e-6)


@pytest.mark.parametrize("shape", [{"fsdp": 8}, {"fsdp": 2, "data": 4}])
def test_the_sum_lies_where_the_parameters_are_wanted(stored, shape):
    mesh = make_mesh(**{"data": 1, **shape})
    sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
    found = weights(stored, sharding, length=0.075)
    assert found.sharding.is_equivalent_to(sharding, 1)
    np.testing.assert_allclose(found, weights(stored, length=0.075), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "longer"}, ["ema='longer'", "did you mean 'long'?", "raw"]),
        ({"length": 0.3}, ["ema_length=0.3", "(0, 0.2886]"]),
        ({"length": 0.0}, ["ema_length=0.0", "(0, 0.2886]"]),
        ({"length": float("nan")}, ["ema_length=nan", "(0, 0.2886]"]),
        ({"length": 0.005}, ["ema_length=0.005", "10 checkpoints", "config.checkpoint.keep_every"]),
        ({"length": 0.08, "powers": {}}, ["ema_length=0.08", "config.ema.powers", "default"]),
    ],
)
def test_mistakes(stored, options, words):
    with pytest.raises(ConfigError) as caught:
        weights(stored, **options)
    assert all(word in str(caught.value) for word in words), caught.value


def test_the_lengths_that_are_offered_can_be_made_and_more_cannot(stored):
    with pytest.raises(ConfigError) as caught:
        weights(stored, length=0.005)
    low = float(str(caught.value).split("expected ")[1].split(" to ")[0])
    assert 0.01 < low < 0.05
    weights(stored, length=low * 1.05)
    with pytest.raises(ConfigError, match="of its profile"):
        weights(stored, length=low * 0.9)


def test_one_checkpoint_reaches_less_far(stored, tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "1004").symlink_to(stored / "1004")
    with pytest.raises(ConfigError, match=r"at 1 checkpoint\) miss"):
        weights(tmp_path / "c", length=0.2)
    path = trajectory()
    found = np.asarray(weights(tmp_path / "c", length=0.07))
    assert np.abs(found - power_average(path, COUNT, 0.07)).max() < 2e-2


# Of eight updates; the lengths above would hold little but the last one.
WIDE = {"short": 0.1, "long": 0.25}


def tiny():
    config = configs.base()
    config.data.name = "points"
    config.network.name = "mlp"
    config.network.mlp.width, config.network.mlp.depth = 16, 1
    config.steps, config.batch_size, config.optimizer.warmup_steps = 8, 8, 1
    config.optimizer.learning_rate = 0.05
    config.logging.tensorboard = False
    config.validation.examples = 0
    config.sampling.num, config.sampling.steps, config.sampling.ema = 8, 2, "wanted"
    config.checkpoint.every = config.checkpoint.keep_every = 2
    config.mesh.data, config.mesh.fsdp, config.mesh.fsdp_min_size = 2, 4, 16
    with config.unlocked():
        config.ema.powers = {**WIDE, "wanted": 0.18}
    return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on 2 x 4 devices that was resumed once."""
    folder, config = tmp_path_factory.mktemp("trained") / "run", tiny()
    config.steps = 4
    diffusion_jax.train(config, folder)
    config.steps = 8
    diffusion_jax.train(config, folder)
    return folder


@pytest.mark.slow
def test_a_run_is_sampled_with_a_length_chosen_afterwards(trained, start_door, tmp_path):
    """Also by a door on one device; `sampling.ema` may name a power function average."""
    wanted = diffusion_jax.load(trained).params
    made = diffusion_jax.load(trained, ema_length=0.18).params
    for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(made), strict=True):
        np.testing.assert_array_equal(a, b)
    doors = {
        flag: start_door(
            "sample", f"--workdir={trained}", "--num=8", f"--out={tmp_path}/{number}", flag
        )
        for number, flag in enumerate(("--ema=wanted", "--ema_length=0.18", "--ema=", "--ema=no"))
    }
    results = {flag: door.wait(120) for flag, door in doors.items()}
    for flag in ("--ema=wanted", "--ema_length=0.18", "--ema="):
        assert results[flag][0] == 0, results[flag][2]
    assert "ema_length=0.18: 1 of 12 stored averages" in results["--ema_length=0.18"][1]
    assert results["--ema=no"][0] == 78
    assert results["--ema=no"][2].startswith("ConfigError: ema='no' is unknown")
    x = [np.load(tmp_path / str(number) / "samples.npz")["x"] for number in range(3)]
    np.testing.assert_array_equal(x[0], x[1])
    assert np.abs(x[0] - x[2]).max() > 1e-4


@pytest.mark.slow
def test_a_length_of_a_run_without_that_one(trained):
    """Without the average of the wanted length among those it is made from."""
    config = workdir.read_config(trained)
    model = builders.model(config, workdir.read_spec(trained))
    compiled = builders.compiled(config, model, builders.mesh(config))
    with Checkpointer(trained / workdir.CHECKPOINTS, read_only=True) as checkpoints:
        assert checkpoints.steps() == [2, 4, 6, 8]

        def of(**options):
            return averages.stored_weights(checkpoints, compiled.abstract_state, **options)

        wanted, raw = of(name="wanted"), of(name="")
        made = of(name="default", length=0.18, powers=WIDE)
    moved = far = 0.0
    for a, b, c in zip(*map(jax.tree.leaves, (wanted, made, raw)), strict=True):
        assert b.sharding.is_equivalent_to(a.sharding, a.ndim)
        far = max(far, float(jnp.abs(a - b).max()))
        moved = max(moved, float(jnp.abs(a - c).max()))
    assert far < 0.1 * moved


@pytest.mark.slow
def test_two_choices_at_once(trained):
    with pytest.raises(ConfigError, match=r"ema_length=0\.08: expected one"):
        diffusion_jax.load(trained, ema="short", ema_length=0.08)
