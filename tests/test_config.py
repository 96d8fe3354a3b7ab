"""Defaults, validation, the JSON round trip, what may change."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags
from PIL import Image
from toys import moons, shipped

from diffusion_jax import api, builders, config_flag, config_rules, data, workdir
from diffusion_jax import config as configs
from diffusion_jax.errors import ConfigError

pytestmark = pytest.mark.usefixtures("quick_programs")

FOLDER = Path(__file__).parents[1] / "configs"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))


def test_defaults_are_valid_and_locked():
    config = configs.base()
    config_rules.validate(config)
    with pytest.raises(AttributeError, match="Did you mean"):
        config.stepz = 3
    with pytest.raises(AttributeError, match="Did you mean"):
        config.network.unet.chanels = 3
    with pytest.raises(TypeError):
        config.steps = "many"


@pytest.mark.parametrize("name", NAMES)
def test_json_round_trip(name):
    config = shipped(name)
    config.checkpoint.keep_every = 7
    with config.ema.decays.unlocked():
        config.ema.decays.long = 0.9999
    text = json.dumps(configs.to_json(config))
    back = configs.from_json(json.loads(text))
    assert back.to_dict() == config.to_dict()
    assert configs.differences(config, back) == {}
    assert back.is_locked
    assert isinstance(back.network.unet.multipliers, tuple)


def test_a_field_that_is_new_takes_its_default():
    values = configs.to_json(shipped("digits"))
    del values["guard"]
    del values["sampling"]["num"]
    back = configs.from_json(values)
    assert back.guard.limit == configs.base().guard.limit
    assert back.sampling.num == configs.base().sampling.num


def test_a_field_that_is_gone_is_an_error():
    with pytest.raises(ConfigError, match=r"config\.steqs=5 .*did you mean config\.steps\?"):
        configs.from_json({"steqs": 5})


def test_differences_name_what_changed():
    old, new = configs.base(), configs.base()
    new.steps, new.network.unet.multipliers = 5, (1, 2)
    assert configs.differences(old, new) == {
        "steps": (1000, 5),
        "network.unet.multipliers": ([1, 2, 2], [1, 2]),
    }


def test_what_may_change_and_what_may_not():
    for path in ("steps", "data.data_dir", "mesh.fsdp", "logging.every", "batch_size"):
        assert configs.may_change(path), path
    for path in ("seed", "network.name", "optimizer.learning_rate", "data.name", "ema.decays.x"):
        assert not configs.may_change(path), path
    old, new = shipped("digits"), shipped("digits")
    new.steps, new.mesh.fsdp = 5, 2
    new.network.dit.depth = 3  # of a branch that is not read
    configs.check_resume(old, new, "here")
    new.network.unet.channels = 48
    with pytest.raises(
        ConfigError, match=r"workdir=here .*config\.network\.unet\.channels: 32 -> 48"
    ):
        configs.check_resume(old, new, "here")


def test_the_prediction_is_read_whatever_the_objective():
    old, new = configs.base(), configs.base()
    old.objective.name = new.objective.name = "variational"
    new.process.gaussian.prediction, new.process.gaussian.sigma_data = "eps", 0.7
    words = r"gaussian\.prediction: 'v' -> 'eps', config\.process\.gaussian\.sigma_data: 0\.5"
    with pytest.raises(ConfigError, match=words):
        configs.check_resume(old, new, "here")


def test_every_option_of_tfds_is_a_field(monkeypatch):
    known = inspect.signature(data.SOURCES["tfds"]).parameters
    known = {key: known[key].default for key in known if key not in ("split", "data_dir")}
    assert known == configs.base().data.tfds.to_dict()
    seen, digits = {}, data.load("digits", "train")
    monkeypatch.setattr(data, "load", lambda *args, **options: seen.update(options) or digits)
    config = configs.base()
    config.data.name = "tfds"
    builders.source(config, "train")
    assert seen.items() >= known.items()


def changed(path: str, value) -> configs.Config:
    config = configs.base()
    *parents, key = path.split(".")
    section = config
    for parent in parents:
        section = section[parent]
    section[key] = value
    return config


@pytest.mark.parametrize(
    ("path", "bad", "good"),
    [
        ("optimizer.clip_norm", -1.0, 0.0),
        ("optimizer.final_scale", -0.1, 0.0),
        ("optimizer.adamw.eps", 0.0, 1e-12),
        ("process.gaussian.sigma_data", 0.0, 0.1),
        ("objective.denoising.weighting.min_snr.gamma", 0.0, 0.1),
    ],
)
def test_ranges(path, bad, good):
    config_rules.validate(changed(path, good))
    with pytest.raises(ConfigError, match=rf"^config\.{re.escape(path)}={bad}: expected"):
        config_rules.validate(changed(path, bad))


@pytest.mark.parametrize(("batch", "words"), [(2, "the next is 3$"), (4, "the next are 3 and 6$")])
def test_batch_sizes_near_a_multiple_of_the_accumulation(batch, words):
    config = configs.base()
    config.batch_size, config.accumulation = batch, 3
    with pytest.raises(ConfigError, match=words):
        config_rules.validate(config)


def test_a_clip_norm_of_zero_clips_nothing():
    norms = {}
    for clip_norm in (0.0, 1.0):
        config = changed("optimizer.clip_norm", clip_norm)
        config.data.name, config.network.name = "points", "mlp"
        config.network.mlp.width, config.network.mlp.depth = 8, 1
        config.optimizer.adamw.eps = 1e3  # large, so that the update is linear in the gradient
        built = builders.model(config, builders.source(config, "train").spec)
        optimizer = builders.trainer(config, built).optimizer
        params = {"w": np.zeros(4, np.float32)}
        gradient = {"w": np.full(4, 50.0, np.float32)}
        update, _ = optimizer.update(gradient, optimizer.init(params), params)
        norms[clip_norm] = float(np.linalg.norm(update["w"]))
    np.testing.assert_allclose(norms[0.0], 100.0 * norms[1.0], rtol=0.1)


def test_every_path_that_may_change_exists():
    known = [path for path, _ in configs.flatten(configs.base())]
    for pattern in configs.MAY_CHANGE:
        assert any(configs.fnmatch.fnmatchcase(path, pattern) for path in known), pattern


def test_an_unknown_variant_lists_the_known():
    with pytest.raises(ConfigError, match=r"'smok' is unknown \(did you mean 'smoke'\?\)"):
        shipped("digits", "smok")


@pytest.mark.parametrize("name", NAMES)
def test_the_full_size_validates(name):
    config_rules.validate(shipped(name))


def commands_of_the_readme() -> list[list[str]]:
    """Arguments of every training command in a block of code."""
    text = (FOLDER.parent / "README.md").read_text().replace("\\\n", " ")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    command = "python -m diffusion_jax.main "
    return [shlex.split(line.split(command)[1]) for line in lines if command in line]


def parsed(monkeypatch, *arguments: str) -> configs.Config:
    """The config that the door reads from its command line."""
    values = flags.FlagValues()
    monkeypatch.setattr(flags, "FLAGS", values)
    monkeypatch.setattr(sys, "argv", ["main", *arguments])
    monkeypatch.chdir(FOLDER.parent)
    config = config_flag.define("a config")
    flags.DEFINE_string("workdir", "", "", flag_values=values)
    flags.DEFINE_bool("dry_run", False, "", flag_values=values)
    values(sys.argv)
    return config.value


def test_the_readme_has_commands():
    assert len(commands_of_the_readme()) >= 2


@pytest.mark.parametrize("arguments", commands_of_the_readme(), ids=" ".join)
def test_every_training_command_of_the_readme_builds(arguments, monkeypatch, tmp_path):
    config = parsed(monkeypatch, *arguments)
    if config.data.path:
        pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        for number in range(60):
            Image.fromarray(pixels + np.uint8(number)).save(tmp_path / f"{number}.png")
        config.data.path = str(tmp_path)
    api.Run.build(config, tmp_path / "run").checkpoints.close()


def test_a_flag_adds_an_average(monkeypatch):
    flag = "--config=configs/toy2d.py:smoke"
    config = parsed(monkeypatch, flag, "--config.ema.decays.long", "0.99", "--config.steps=7")
    assert config.ema.decays.to_dict() == {"default": 0.998, "long": 0.99}
    assert config.steps == 7
    assert config.is_locked
    assert "long" not in parsed(monkeypatch, flag).ema.decays


def test_flags_make_and_change_parameter_groups(monkeypatch, tmp_path):
    file = tmp_path / "grouped.py"
    file.write_text(
        "from diffusion_jax import config\ndef get_config():\n    c = config.base()\n"
        "    with c.parameter_groups.unlocked():\n"
        "        c.parameter_groups.last = {'pattern': 'head', 'rate': 1e-3}\n    return c\n"
    )
    options = ["--config.parameter_groups.last.rate=1e-4", "--config.parameter_groups.a.decay=0.1"]
    config = parsed(
        monkeypatch, f"--config={file}", *options, "--config.parameter_groups.a.pattern=b"
    )
    assert config.parameter_groups.to_dict() == {
        "last": {"pattern": "head", "rate": 1e-4, "decay": None},
        "a": {"pattern": "b", "rate": None, "decay": 0.1},
    }
    config_rules.validate(config)
    back = configs.from_json(json.loads(json.dumps(configs.to_json(config))))
    assert back.parameter_groups == config.parameter_groups
    plain = configs.from_json(configs.to_json(config))
    with plain.parameter_groups.unlocked():
        plain.parameter_groups.last = {"pattern": "head", "rate": 1e-4}
    configs.check_resume(config, plain, "here")
    plain.parameter_groups.last.rate = 2e-4
    words = r"config\.parameter_groups\.last\.rate: 0\.0001 -> 0\.0002"
    with pytest.raises(ConfigError, match=words):
        configs.check_resume(config, plain, "here")


@pytest.fixture(scope="module")
def small():
    """A config of little work that asks for more validation examples than there are."""
    return moons(validation__examples=16, data__points__held_out=12)


@pytest.fixture(scope="module")
def trained(small, tmp_path_factory):
    """(workdir, standard output) of a run of that config."""
    folder = tmp_path_factory.mktemp("small")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        api.train(small, folder)
    return folder, out.getvalue()


def test_a_run_keeps_the_precision_that_it_began_with(small, trained, monkeypatch, tmp_path):
    """`auto` is settled at the start: another machine neither resumes nor samples in another."""
    folder = shutil.copytree(trained[0], tmp_path / "run")
    assert small.compute_dtype == "auto"
    assert workdir.read_config(folder).compute_dtype == "float32"
    api.Run.build(small, folder).checkpoints.close()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(ConfigError, match=r"config\.compute_dtype: 'float32' -> 'bfloat16'"):
        api.Run.build(small, folder)
    seen = []
    inner = builders.models.functional
    monkeypatch.setattr(
        builders.models, "functional", lambda make: seen.append(make.keywords) or inner(make)
    )
    api.load(folder)
    assert {keywords["dtype"] for keywords in seen} == {np.dtype("float32")}
    described = json.loads((folder / "config.json").read_text())
    described["config"]["compute_dtype"] = "auto"  # as it was kept once
    (folder / "config.json").write_text(json.dumps(described))
    api.Run.build(small, folder).checkpoints.close()


def test_more_examples_than_are_held_out_is_said_and_may_be_mended(small, trained, capsys):
    folder, out = trained
    assert out.count("config.validation.examples=16: 12 are held out, all used\n") == 1
    enough = configs.from_json(configs.to_json(small))
    enough.data.points.held_out = 16
    enough.steps += 1
    api.train(enough, folder)
    assert "held out" not in capsys.readouterr().out
