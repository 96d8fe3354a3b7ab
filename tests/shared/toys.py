"""Configs of runs that take seconds."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from diffusion_jax import api, builders, workdir
from diffusion_jax import config as configs
from diffusion_jax.parallel.mesh import make_mesh


def changed(config, **changes):
    """`config` itself, where `a__b=v` has set `config.a.b`."""
    for path, value in changes.items():
        *parents, key = path.split("__")
        section = config
        for parent in parents:
            section = section[parent]
        section[key] = value
    return config


def shipped(name: str, variant: str = ""):
    """The config `configs/<name>.py:<variant>`."""
    file = Path(__file__).parents[2] / "configs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variant)


def tiny(**changes):
    """A config of one small step on points; `a__b=v` sets `config.a.b`."""
    config = configs.base()
    config.data.name = "points"
    config.network.name = "mlp"
    config.network.mlp.width, config.network.mlp.depth = 8, 1
    config.steps, config.batch_size, config.optimizer.warmup_steps = 1, 8, 1
    config.logging.tensorboard = False
    config.validation.examples = 8
    config.sampling.num, config.sampling.steps = 8, 1
    return changed(config, **changes)


# Of two classes; what the fixture `moons_run` trained.
moons = functools.partial(tiny, data__points__distribution="moons")


def captioned(root: Path) -> tuple[Path, api.Run]:
    """A run of forty captioned pictures that saved its first state: (workdir, the run)."""
    for number in range(40):
        (root / "pictures").mkdir(exist_ok=True)
        picture = Image.fromarray(np.full((8, 8, 3), 6 * number, np.uint8))
        picture.save(root / "pictures" / f"{number}.png")
        (root / "pictures" / f"{number}.txt").write_text(f"grey {number}")
    config = configs.base()
    config.data.update({"name": "image_folder", "path": str(root / "pictures")})
    config.data.image_folder.update(
        {"captions": "files", "text_length": 8, "validation_share": 0.3}
    )
    config.network.name, config.text.name = "dit", "bytes"
    config.network.dit.update({"dim": 16, "heads": 2, "depth": 1, "patch": 4, "expansion": 1})
    config.text.bytes.update({"dim": 16, "depth": 1, "heads": 2})
    config.steps, config.batch_size, config.optimizer.warmup_steps = 1, 8, 1
    config.sampling.update({"num": 8, "steps": 2, "batch_size": 8})
    run = api.Run.build(config, root / "run")
    state = run.compiled.init()
    run.save(state, 0)
    run._saves.close()
    workdir.write_config(
        root / "run", run.config, run.model.spec, len(run.train_data), run.train_ids
    )
    run.held.release()
    return root / "run", run


@contextlib.contextmanager
def one_device() -> Iterator[None]:
    """Runs and pipelines made in here have one device, whose programs compile in half the time."""
    with pytest.MonkeyPatch.context() as patch:
        mesh = functools.partial(make_mesh, devices=jax.devices()[:1])
        patch.setattr(builders.engine, "make_mesh", mesh)
        yield
