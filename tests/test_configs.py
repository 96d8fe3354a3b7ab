"""Every config builds at its full size, and takes a step at that of its variant `smoke`."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from quick import jit
from toys import shipped

from diffusion_jax import api, builders, config_rules
from diffusion_jax.data import DataSpec
from diffusion_jax.errors import DataError
from diffusion_jax.objectives.base import Context, network_params

FOLDER = Path(__file__).parents[1] / "configs"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))
# Data that need no folder and no download.
EMBEDDED = (
    "digits",
    "digits_masked",
    "digits_uniform",
    "dpm2015_digits",
    "dpm2015_heartbeat",
    "dpm2015_swiss_roll",
    "heartbeat",
    "toy2d",
)
IMAGES = {
    "mnist": ((28, 28, 1), 10),
    "dpm2015_mnist": ((28, 28, 1), 10),
    "fashion_mnist": ((28, 28, 1), 10),
    "cifar10": ((32, 32, 3), 10),
    "cifar10_dit": ((32, 32, 3), 10),
    "imagenet64": ((64, 64, 3), 1000),
    "imagenet256_pixel": ((256, 256, 3), 1000),
    "image_folder": ((64, 64, 3), 3),
}
SPECS = {
    name: DataSpec(shape=shape, kind="image", num_classes=classes)
    for name, (shape, classes) in IMAGES.items()
} | {
    "emoji_text": DataSpec(shape=(32, 32, 3), kind="image", text_length=64),
    "text8": DataSpec(shape=(256,), kind="tokens", vocabulary=27),
    "imagenet256_latent": DataSpec(
        shape=(32, 32, 4), kind="latent", num_classes=1000, range=(-3.0, 3.0)
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_every_config_builds_at_full_size(name):
    config = shipped(name)
    config_rules.validate(config)
    spec = SPECS[name] if name in SPECS else builders.source(config, "train").spec
    mesh = builders.mesh(config)
    model = builders.model(config, spec)
    state = builders.compiled(config, model, mesh).abstract_state
    params = network_params(state.params)
    builders.pipeline(config, model, params, mesh).trace()
    # Published sizes; DiT-XL/2 has 675 million with the second half of its output, which it
    # spends on a variance and ours does not have.
    published = {"imagenet256_latent": 675e6, "imagenet64": 280e6, "imagenet256_pixel": 131e6}
    if name in published:
        count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
        assert count == pytest.approx(published[name], rel=0.01)


@pytest.fixture(scope="session")
def own_data(tmp_path_factory, write_tfds):
    """Flags that point each config to a small data set of the kind that it reads."""
    root = tmp_path_factory.mktemp("own")
    rng = np.random.default_rng(0)
    _write_pictures(root / "pictures", rng)
    _write_latents(root / "latents", rng)
    for channels, side in ((1, 28), (3, 32)):
        pixels = rng.integers(0, 256, (16, side, side, channels), dtype=np.uint8)
        pixels = pixels[..., 0] if channels == 1 else pixels
        shape = (str(side), str(side), str(channels))
        write_tfds(root / f"tfds{channels}", pixels, rng.integers(0, 3, 16), shape=shape)
    (root / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 400)

    def flags(name: str) -> list[str]:
        config = shipped(name)
        match config.data.name:
            case "tfds":
                folder = root / ("tfds1" if "mnist" in name else "tfds3")
                own = ["name=tiny_shapes", "train=train", "validation=test"]
                extra = [f"--config.data.tfds.{flag}" for flag in own]
                return [f"--config.data.data_dir={folder}", *extra]
            case "image_folder":
                return [f"--config.data.path={root / 'pictures'}"]
            case "latents":
                return [f"--config.data.path={root / 'latents'}"]
            case "text":
                return [f"--config.data.path={root / 'text.txt'}"]
        return []

    return flags


def _write_pictures(folder: Path, rng: np.random.Generator) -> None:
    lines = []
    for number in range(120):
        file = Path("ab"[number % 2]) / f"{number}.png"
        (folder / file).parent.mkdir(exist_ok=True, parents=True)
        Image.fromarray(rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(folder / file)
        lines.append(json.dumps({"file_name": str(file), "text": f"noise {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def _write_latents(folder: Path, rng: np.random.Generator) -> None:
    for split, count in (("train", 24), ("validation", 8)):
        (folder / split).mkdir(parents=True)
        np.save(folder / split / "x.npy", rng.normal(size=(count, 32, 32, 4)).astype(np.float16))
        np.save(folder / split / "label.npy", rng.integers(0, 1000, count))


def take_a_step(start_door, name: str, folder: Path, *options: str, devices: int = 1) -> None:
    arguments = [f"--config=configs/{name}.py:smoke", f"--workdir={folder}", *options]
    arguments += ["--config.steps=1", "--config.logging.tensorboard=False"]
    code, out, err = start_door("main", *arguments, DIFFUSION_JAX_CPU_DEVICES=devices).wait(300)
    assert code == 0, err
    assert "1 steps done" in out
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows} == {1}
    assert np.isfinite(rows[0]["train/loss"])
    assert np.isfinite(rows[1]["val/loss_ema"])
    assert list((folder / "samples").iterdir())


@pytest.mark.parametrize("name", ["heartbeat"])
def test_a_config_takes_a_step(start_door, own_data, name, tmp_path):
    take_a_step(start_door, name, tmp_path / name, *own_data(name))
    assert (tmp_path / name / "samples" / "00000001.png").exists()
    assert (tmp_path / name / "trajectory.gif").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in NAMES if n != "heartbeat"])
def test_every_other_config_takes_a_step(start_door, own_data, name, tmp_path):
    take_a_step(start_door, name, tmp_path / name, *own_data(name))


@pytest.mark.slow
def test_another_network_on_another_mesh_by_flags_alone(start_door, tmp_path):
    options = (
        "--config.network.name=dit",
        "--config.network.dit.dim=16",
        "--config.network.dit.depth=2",
        "--config.network.dit.heads=2",
        "--config.mesh.data=2",
        "--config.mesh.fsdp=4",
        "--config.mesh.fsdp_min_size=64",
        "--config.accumulation=2",
    )
    take_a_step(start_door, "digits", tmp_path / "run", *options, devices=8)


def test_mnist_without_data_says_what_is_missing(tmp_path):
    config = shipped("mnist", "smoke")
    config.data.data_dir = str(tmp_path / "nothing")
    with pytest.raises(DataError) as error:
        api.train(config, tmp_path / "run")
    assert "mnist" in str(error.value)
    assert str(tmp_path / "nothing") in str(error.value)


def test_latents_that_are_missing_name_the_door_that_makes_them(start_door, tmp_path):
    flags = ("--config=configs/imagenet256_latent.py", f"--workdir={tmp_path / 'run'}")
    code, _, err = start_door("main", *flags).wait()
    assert code == 65
    assert err.count("\n") == 1
    assert "python -m diffusion_jax.prepare" in err


@pytest.mark.parametrize("name", EMBEDDED)
def test_no_config_asks_for_more_than_is_held_out(name):
    config = shipped(name)
    assert config.validation.examples <= len(builders.source(config, "validation"))


@pytest.mark.parametrize("tokens", [False, True])
def test_edm2_keeps_its_weights_at_unit_magnitude_after_updates(tokens):
    config = shipped("digits_masked" if tokens else "imagenet64", "smoke")
    config.network.name = "edm2"
    config.network.edm2.update(shipped("imagenet64", "smoke").network.edm2)
    spec = DataSpec(shape=(8, 8, 3), kind="image", num_classes=3)
    if tokens:
        spec = builders.source(config, "train").spec
    model = builders.model(config, spec)
    shapes = jax.eval_shape(model.network.init, jax.random.key(0))
    rng = np.random.default_rng(0)
    grown = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) + 2.0), shapes)
    context = Context(jnp.uint32(0), {}, {}, {}, jnp.zeros(1), 1)
    update = builders.objective(config, model).post_update
    # As one program: to compile each operation for each shape takes ten times as long.
    after = jit(lambda params: update(params, context))({**grown, "objective": {}})
    kernel = (after["inner"] if tokens else after)["head"]["kernel"]
    axes = tuple(range(kernel.ndim - 1))
    np.testing.assert_allclose(np.mean(np.square(kernel), axis=axes), 1.0, rtol=1e-4)
