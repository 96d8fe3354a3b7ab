"""Every mistake of a user ends in one line that names it, before anything is compiled."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

import diffusion_jax
from diffusion_jax import api, builders, data, doors, start, workdir
from diffusion_jax import config as configs
from diffusion_jax.data.identity import fingerprint
from diffusion_jax.errors import ConfigError, DataError, Preempted


def tiny(**changes):
    """A config of one small step; `a__b=v` sets `config.a.b`."""
    config = configs.base()
    config.data.name = "points"
    config.network.name = "mlp"
    config.network.mlp.width, config.network.mlp.depth = 8, 1
    config.steps, config.batch_size, config.optimizer.warmup_steps = 1, 8, 1
    config.logging.tensorboard = False
    config.validation.examples = 8
    config.sampling.num, config.sampling.steps = 8, 1
    for path, value in changes.items():
        *parents, key = path.split("__")
        section = config
        for parent in parents:
            section = section[parent]
        section[key] = value
    return config


def unet(**changes):
    return tiny(data__name="digits", network__name="unet", **changes)


def dit(**changes):
    small = {"network__dit__dim": 16, "network__dit__heads": 2, "network__dit__depth": 1}
    return tiny(data__name="digits", network__name="dit", **small, **changes)


def bits(**changes):
    binomial = {"process__name": "binomial", "network__noise_input": "t"}
    fixed = {"objective__name": "variational", "sampling__solver": "ancestral", **binomial}
    return tiny(data__name="heartbeat", **fixed, **changes)


def without(*paths: str) -> ConfigDict:
    """A config of another making, which lacks some fields."""
    values = tiny().to_dict()
    for path in paths:
        *parents, key = path.split("__")
        section = values
        for parent in parents:
            section = section[parent]
        del section[key]
    return ConfigDict(values)


@pytest.fixture
def no_compiling(monkeypatch):
    """Fails a test that would start to compile a program of ours."""

    def refuse(*args, **kwargs):
        raise AssertionError("compiled before the mistake was found")

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)


MISTAKES = {
    "component": (
        lambda: tiny(network__name="mpl"),
        ["config.network.name='mpl'", "did you mean 'mlp'?", "dit, edm2, mlp, unet, uvit"],
    ),
    "schedule": (
        lambda: tiny(process__gaussian__schedule__name="cosin"),
        ["config.process.gaussian.schedule.name='cosin'", "'cosine'"],
    ),
    "weighting": (
        lambda: tiny(objective__denoising__weighting__name="snrr"),
        ["config.objective.denoising.weighting.name='snrr'", "'snr'"],
    ),
    "prediction": (
        lambda: tiny(process__gaussian__prediction="epss"),
        ["config.process.gaussian.prediction='epss'", "'eps'"],
    ),
    "prediction of no x0": (
        lambda: tiny(
            process__gaussian__prediction="eps",
            process__gaussian__schedule__name="rectified_flow",
        ),
        ["config.process.gaussian.prediction='eps'", "use 'v'"],
    ),
    "noise input": (
        lambda: tiny(network__noise_input="logsn"),
        ["config.network.noise_input='logsn'", "'logsnr'"],
    ),
    "solver": (
        lambda: tiny(sampling__solver="dpmpp"),
        ["config.sampling.solver='dpmpp'", "dpmpp_2m"],
    ),
    "solver option": (
        lambda: tiny(sampling__solver="ddim", sampling__ddim__eta=5.0),
        ["eta=5.0", "from 0"],
    ),
    "guidance": (
        lambda: tiny(sampling__guidance=2.0),
        ["config.sampling.guidance=2.0", "unconditional"],
    ),
    "guidance of a model that never drops its labels": (
        lambda: unet(sampling__guidance=2.0, objective__denoising__label_dropout=0.0),
        ["config.sampling.guidance=2.0", "label_dropout=0", "expected 1"],
    ),
    "time grid": (
        lambda: tiny(sampling__grid__name="karas"),
        ["config.sampling.grid.name='karas'", "did you mean 'karras'?"],
    ),
    "time grid of bits": (
        lambda: bits(sampling__grid__name="karas"),
        ["config.sampling.grid.name='karas'", "did you mean 'karras'?"],
    ),
    "noise levels of bits": (
        lambda: bits(sampling__grid__name="karras"),
        ["config.sampling.grid.name='karras'", "'binomial'", "expected 'uniform'"],
    ),
    "shifted times of bits": (
        lambda: bits(sampling__grid__name="shifted"),
        ["config.sampling.grid.name='shifted'", "'binomial'", "expected 'uniform'"],
    ),
    "threshold": (
        lambda: tiny(sampling__threshold="dynamc"),
        ["config.sampling.threshold='dynamc'", "did you mean 'dynamic'?"],
    ),
    "threshold of points": (
        lambda: tiny(sampling__threshold="dynamic"),
        ["config.sampling.threshold='dynamic'", "points", "expected 'auto' or 'none'"],
    ),
    "threshold of bits": (
        lambda: bits(sampling__threshold="static"),
        ["config.sampling.threshold='static'", "bits", "expected 'auto' or 'none'"],
    ),
    "batch and mesh": (
        lambda: tiny(batch_size=12),
        ["config.batch_size=12", "8 batch shards", "nearest: 8 or 16"],
    ),
    "batch and accumulation": (
        lambda: tiny(batch_size=8, accumulation=3),
        ["config.batch_size=8", "config.accumulation=3", "6 and 9"],
    ),
    "validation batch": (
        lambda: tiny(validation__batch_size=12),
        ["config.validation.batch_size=12", "nearest: 8 or 16"],
    ),
    "mesh": (
        lambda: tiny(mesh__data=3),
        ["config.mesh.data=3", "device count 8", "nearest: mesh.data=8"],
    ),
    "mesh of two axes": (
        lambda: tiny(mesh__data=2, mesh__fsdp=2),
        ["mesh.data=2 x mesh.fsdp=2 = 4", "device count 8"],
    ),
    "image too small": (
        lambda: unet(network__unet__multipliers=(1, 2, 2, 2, 2)),
        ["config.network.unet.multipliers=(1, 2, 2, 2, 2)", "8x8 cannot be halved 4 times"],
    ),
    "patch": (
        lambda: dit(network__dit__patch=3),
        ["config.network.dit.patch=3", "8", "nearest: 2"],
    ),
    "points for a U-Net": (
        lambda: tiny(network__name="unet"),
        ["config.network.unet", "mlp"],
    ),
    "type in a tuple": (
        lambda: unet(network__unet__multipliers=("1", "a")),
        ["config.network.unet.multipliers=('1', 'a')", "expected numbers"],
    ),
    "steps": (lambda: tiny(steps=0), ["config.steps=0", "at least 1"]),
    "seed": (lambda: tiny(seed=-1), ["config.seed=-1", "at least 0"]),
    "large seed": (lambda: tiny(seed=2**32), ["config.seed=4294967296", "less than 2**32"]),
    "learning rate": (
        lambda: tiny(optimizer__learning_rate=float("nan")),
        ["config.optimizer.learning_rate=nan", "finite"],
    ),
    "warm-up": (
        lambda: tiny(optimizer__warmup_steps=10),
        ["config.optimizer.warmup_steps=10", "0..1"],
    ),
    "average": (
        lambda: tiny(sampling__ema="slow"),
        ["config.sampling.ema='slow'", "default"],
    ),
    "decay": (
        lambda: tiny(ema__decays__default=1.0),
        ["config.ema.decays.default=1.0", "< 1"],
    ),
    "bits under a Gaussian process": (
        lambda: tiny(data__name="heartbeat"),
        ["config.process.name='gaussian'", "'binomial'"],
    ),
    "attention kernel": (
        lambda: dit(network__dit__attention="cudnn"),
        ["config.network.dit.attention='cudnn'", "computes on cpu", "expected 'auto'"],
    ),
    "length of an interval": (
        lambda: unet(sampling__guidance_interval=(0.5,)),
        ["config.sampling.guidance_interval=(0.5,)", "0 <= low < high <= 1"],
    ),
    "guidance interval of an unconditional model": (
        lambda: tiny(sampling__guidance_interval=(0.2, 0.5)),
        ["config.sampling.guidance_interval=(0.2, 0.5)", "unconditional"],
    ),
    "percentile": (
        lambda: unet(sampling__threshold_percentile=1.5),
        ["config.sampling.threshold_percentile=1.5", "between 0 and 1"],
    ),
    "exponent of a grid": (
        lambda: tiny(sampling__grid__name="karras", sampling__grid__karras__rho=0.0),
        ["config.sampling.grid.karras.rho=0.0"],
    ),
    "exponent of a grid beyond floating point": (
        lambda: tiny(sampling__grid__name="karras", sampling__grid__karras__rho=1e-30),
        ["config.sampling.grid.karras.rho=1e-30"],
    ),
    "shift of a grid": (
        lambda: tiny(sampling__grid__name="shifted", sampling__grid__shifted__shift=-1.0),
        ["config.sampling.grid.shifted.shift=-1.0"],
    ),
    "option of another solver": (
        lambda: tiny(sampling__solver="heun", sampling__ddpm__variance="smal"),
        ["config.sampling.ddpm.variance='smal'", "small, large"],
    ),
    "width of the time sampling": (
        lambda: tiny(
            objective__denoising__time__name="log_normal",
            objective__denoising__time__log_normal__std=0.0,
        ),
        ["config.objective.denoising.time.log_normal.std=0.0", "above 0"],
    ),
    "profile after the end": (
        lambda: tiny(logging__profile_at=2),
        ["config.logging.profile_at=2", "at most config.steps=1"],
    ),
    "held-out points": (
        lambda: tiny(data__points__held_out=0),
        ["config.data.points.held_out=0", "at least 1"],
    ),
    "nothing where a number belongs": (
        lambda: tiny(optimizer__clip_norm=None),
        ["config.optimizer.clip_norm=None", "expected float, such as 1.0"],
    ),
    "fields that are missing": (
        lambda: without("guard", "logging__every"),
        ["config.guard.limit, config.logging.every: missing", "diffusion_jax.config.base()"],
    ),
    "many fields that are missing": (
        lambda: without("network"),
        ["config.network.dit.attention, ", " more: missing", "diffusion_jax.config.base()"],
    ),
    "a field that is unknown": (
        lambda: ConfigDict({**tiny().to_dict(), "stepz": 3}),
        ["config.stepz=3 is not a field", "did you mean config.steps?"],
    ),
    "a text in place of a section": (
        lambda: ConfigDict({**tiny().to_dict(), "network": "mlp"}),
        ["config.network='mlp'", "expected a section, with fields such as dit"],
    ),
    "a text in place of a number": (
        lambda: ConfigDict({**tiny().to_dict(), "steps": "3"}),
        ["config.steps='3'", "expected int, such as 1000"],
    ),
    "no config": (lambda: {"steps": 3}, ["config={'steps': 3}", "diffusion_jax.config.base()"]),
    "set of points": (
        lambda: tiny(data__points__distribution="swiss"),
        ["config.data.points.distribution='swiss'", "'swiss_roll'"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_a_config(mistake, tmp_path, no_compiling):
    make, words = MISTAKES[mistake]
    with pytest.raises(ConfigError) as error:
        diffusion_jax.train(make(), tmp_path / "run")
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    assert not (tmp_path / "run" / "config.json").exists()


def test_the_tiny_config_itself_is_right(tmp_path):
    for number, config in enumerate(
        (tiny(), unet(network__unet__attention_resolutions=()), dit(), bits())
    ):
        api.Run.build(config, tmp_path / str(number)).checkpoints.close()


@pytest.mark.parametrize(
    ("make", "threshold", "expected"),
    [
        (unet, "auto", "static"),
        (unet, "none", "none"),
        (unet, "dynamic", "dynamic"),
        (tiny, "auto", "none"),
        (tiny, "none", "none"),
        (bits, "auto", "none"),
    ],
)
def test_thresholds(make, threshold, expected):
    config = make(sampling__threshold=threshold)
    built = builders.model(config, builders.source(config, "train").spec)
    assert builders.sampling_options(config, built).threshold == expected


def test_missing_data(tmp_path):
    config = tiny(data__name="tfds", data__data_dir=str(tmp_path / "nothing"))
    with pytest.raises(DataError) as error:
        diffusion_jax.train(config, tmp_path / "run")
    assert str(tmp_path / "nothing") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workdir after one step of a class-conditional model of points."""
    folder = tmp_path_factory.mktemp("bad") / "trained"
    diffusion_jax.train(tiny(data__points__distribution="moons"), folder)
    return folder


@pytest.fixture
def copy(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def edit(folder: Path, **changes) -> None:
    """Changes `config.json` by hand."""
    file = folder / "config.json"
    described = json.loads(file.read_text())
    for path, value in changes.items():
        *parents, key = path.split("__")
        section = described["config"]
        for parent in parents:
            section = section[parent]
        section[key] = value
    file.write_text(json.dumps(described))


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_field_that_may_not_change(copy):
    before = snapshot(copy)
    config = tiny(data__points__distribution="moons", seed=3, network__mlp__width=16)
    with pytest.raises(ConfigError) as error:
        diffusion_jax.train(config, copy)
    assert "config.seed: 0 -> 3" in str(error.value)
    assert "config.network.mlp.width: 8 -> 16" in str(error.value)
    assert str(copy) in str(error.value)
    assert snapshot(copy) == before


def test_other_data_under_the_same_name(copy):
    file = copy / "config.json"
    described = json.loads(file.read_text())
    described["train_examples"] = 65535
    described["data_spec"]["classes"] = ["left", "right"]
    file.write_text(json.dumps(described))
    before = snapshot(copy)
    with pytest.raises(ConfigError) as error:
        diffusion_jax.train(tiny(data__points__distribution="moons", steps=2), copy)
    assert str(copy) in str(error.value)
    assert "train_examples: 65535 -> 65536" in str(error.value)
    assert "data_spec.classes: ('left', 'right') -> " in str(error.value)
    assert snapshot(copy) == before


def test_other_examples_of_the_same_number(copy):
    config = tiny(data__points__distribution="moons", steps=2)
    file = copy / "config.json"
    described = json.loads(file.read_text())
    described["train_ids"] = "0" * 32
    file.write_text(json.dumps(described))
    before = snapshot(copy)
    with pytest.raises(ConfigError, match="other training examples, as many as these") as error:
        diffusion_jax.train(config, copy)
    assert str(copy) in str(error.value)
    assert snapshot(copy) == before
    # Earlier versions kept none.
    del described["train_ids"]
    file.write_text(json.dumps(described))
    api.Run.build(config, copy).checkpoints.close()


def test_processes_with_other_examples(monkeypatch):
    source = data.load("points", "train", size=4, held_out=4)
    mine = fingerprint(source)
    monkeypatch.setattr(start, "gather_json", lambda value: [value, ["f" * 32, 4]])
    with pytest.raises(DataError, match="the 4 training examples of process 1 are not the 4 of"):
        start.agree_on_data(source)
    monkeypatch.setattr(start, "gather_json", lambda value: [value, value])
    assert start.agree_on_data(source) == mine


def test_a_field_of_a_branch_that_is_not_in_use_may_change(copy):
    config = tiny(data__points__distribution="moons", network__dit__dim=64)
    assert int(diffusion_jax.train(config, copy).step) == 1


def test_a_checkpoint_of_another_architecture(copy):
    edit(copy, network__mlp__width=16)
    config = tiny(data__points__distribution="moons", network__mlp__width=16)
    for act in (lambda: diffusion_jax.train(config, copy), lambda: diffusion_jax.load(copy)):
        with pytest.raises(ConfigError) as error:
            act()
        message = str(error.value)
        assert "another architecture" in message
        assert "condition/noise/fc1/bias: stored float32(8,), expected float32(16,)" in message
        assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("network__mlp__width", "wide", ["config.network.mlp.width='wide'", "expected int"]),
        ("network__mlp__widht", 8, ["config.network.mlp.widht=8", "config.network.mlp.width?"]),
        ("steps", {"a": 1}, ["config.steps={'a': 1}", "expected int, such as 1000"]),
        ("network", 3, ["config.network=3", "expected a section", "fields such as dit"]),
        ("ema__decays", [], ["config.ema.decays=[]", "expected a section"]),
        ("ema__decays__default", "x", ["config.ema.decays.default='x'", "expected a number"]),
        ("seed", None, ["config.seed=None", "expected int, such as 0"]),
        ("network__name", "mpl", ["config.network.name='mpl'", "'mlp'"]),
    ],
)
def test_a_damaged_description(copy, name, value, words):
    edit(copy, **{name: value})
    with pytest.raises(ConfigError) as error:
        diffusion_jax.load(copy)
    assert all(word in str(error.value) for word in words)


def test_unreadable_descriptions(copy, tmp_path):
    cases = {tmp_path / "nowhere": "does not exist", copy / "samples": "no config.json"}
    for folder, words in cases.items():
        with pytest.raises(ConfigError, match=words):
            diffusion_jax.load(folder)
    (copy / "config.json").write_text('{"config": ')
    for act in (lambda: diffusion_jax.load(copy), lambda: diffusion_jax.train(tiny(), copy)):
        with pytest.raises(ConfigError, match=r"config\.json cannot be read: Expecting value"):
            act()
    (copy / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"holds checkpoints but no config\.json"):
        diffusion_jax.train(tiny(), copy)


def test_a_workdir_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written: Not a directory"):
        diffusion_jax.train(tiny(), tmp_path / "file" / "run")
    with pytest.raises(ConfigError, match="cannot be read: Not a directory"):
        workdir.read_config(tmp_path / "file" / "run")


WITHOUT_RIGHTS = """
import os, sys
import diffusion_jax
from diffusion_jax import config as configs, workdir
if os.getuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
for act in (lambda: workdir.prepare(sys.argv[1] + "/new", configs.base()),
            lambda: workdir.prepare(sys.argv[1], configs.base()),
            lambda: workdir.read_config(sys.argv[2])):
    try:
        act()
    except diffusion_jax.errors.ConfigError as error:
        print(error)
"""


def test_permissions(tmp_path):
    """In a process without the rights of root, whom permissions do not bind."""
    closed, secret = tmp_path / "closed", tmp_path / "secret"
    for folder in (closed, secret):
        folder.mkdir()
    (secret / "config.json").write_text("{}")
    for folder in [*tmp_path.parents][:2]:
        folder.chmod(0o755)
    tmp_path.chmod(0o755)
    closed.chmod(0o555)
    (secret / "config.json").chmod(0o000)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_RIGHTS, closed, secret],
        capture_output=True,
        text=True,
        timeout=60,
    )
    lines = done.stdout.splitlines()
    assert lines == [
        f"workdir={closed}/new cannot be written: Permission denied",
        f"workdir={closed} cannot be written: Permission denied",
        f"workdir={secret} cannot be read: Permission denied",
    ], done.stderr


@pytest.fixture
def cache_setting(monkeypatch):
    """Reads JAX's cache folder; puts it back afterwards."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    names = [
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    ]
    before = {name: getattr(jax.config, name) for name in names}
    yield lambda: jax.config.jax_compilation_cache_dir
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_cache_of_the_environment_goes_before_that_of_the_config(
    copy, tmp_path, monkeypatch, cache_setting
):
    edit(copy, compilation_cache=str(tmp_path / "config"))
    diffusion_jax.load(copy)
    assert cache_setting() == str(tmp_path / "config")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "environment"))
    diffusion_jax.load(copy)
    assert cache_setting() == str(tmp_path / "environment")


def test_a_cache_that_cannot_be_written(copy, tmp_path, monkeypatch, capsys, cache_setting):
    """The user's own folder costs a warning; one that was asked for is an error."""
    (tmp_path / "file").write_text("")
    below = str(tmp_path / "file" / "cache")
    monkeypatch.setattr(start, "default_cache", lambda: Path(below))
    assert len(diffusion_jax.load(copy).sample(2)) == 2
    err = capsys.readouterr().err
    assert err.startswith("Warning: every start compiles anew: ")
    assert below in err
    assert err.count("\n") == 1
    edit(copy, compilation_cache=below)
    with pytest.raises(ConfigError, match=rf"^config\.compilation_cache='{below}' cannot be"):
        diffusion_jax.load(copy)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", below)
    with pytest.raises(ConfigError, match=r"^JAX_COMPILATION_CACHE_DIR: "):
        diffusion_jax.load(copy)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"labels": [0, 2]}, ["labels=2", "0..1"]),
        ({"labels": [-1]}, ["labels=-1", "0..1"]),
        ({"labels": np.array([0.5])}, ["labels=array([0.5])", "whole numbers"]),
        ({"solver": "heunn"}, ["solver='heunn'", "'heun'"]),
        ({"steps": 0}, ["steps=0", "at least 1"]),
        ({"num": 0}, ["num=0", "at least 1"]),
        ({"batch_size": 0}, ["batch_size=0", "at least 1"]),
        ({"seed": -1}, ["seed=-1", "0 <= seed"]),
        ({"guidance": float("inf")}, ["guidance=inf", "finite"]),
    ],
)
def test_mistakes_in_sampling(trained, options, words):
    with pytest.raises(ConfigError) as error:
        diffusion_jax.load(trained).sample(**options)
    assert all(word in str(error.value) for word in words)


def test_a_full_disk_leaves_earlier_checkpoints(start_door, tmp_path):
    """A limit on the size of a file stands in for a full disk: writing fails midway."""
    folder = tmp_path / "run"
    options = (
        "--config=configs/toy2d.py:smoke",
        "--config.logging.tensorboard=False",
        f"--workdir={folder}",
    )
    assert start_door("main", *options).wait()[0] == 0
    whole = snapshot(folder / "checkpoints")
    code, _, err = start_door("main", *options, "--config.steps=8", file_limit=2000).wait()
    lines = [line for line in err.splitlines() if not line.startswith(("train step", "step "))]
    assert code == 78, err
    assert len(lines) == 1, err
    assert lines[0].startswith("ConfigError: ")
    assert "File too large" in lines[0]
    assert {path: whole[path] for path in whole} == {
        path: data for path, data in snapshot(folder / "checkpoints").items() if path in whole
    }
    assert len(diffusion_jax.load(folder).sample(3)) == 3
    assert start_door("main", *options, "--config.steps=8").wait()[0] == 0


SMOKE = "--config=configs/toy2d.py:smoke"
SPACED = SMOKE.split("=")
FLAGS = [
    (["--config=configs/nothing.py"], ["--config='configs/nothing.py' is no file"]),
    (["--config=configs/toy2d.py:smok"], ["'smok'", "did you mean 'smoke'?"]),
    ([SMOKE, "--workdi=x"], ["--workdi is no flag", "did you mean --workdir?"]),
    ([SMOKE, "--config.stepz=3"], ["config.stepz='3'", "did you mean config.steps?"]),
    (
        [SMOKE, "--config.network.mlp.widht=3"],
        ["config.network.mlp.widht='3'", "did you mean config.network.mlp.width?"],
    ),
    ([SMOKE, "--config.steps=abc"], ["config.steps='abc'", "a whole number"]),
    ([SMOKE, "--config.ema.warmup=si"], ["config.ema.warmup='si'", "True or False"]),
    ([SMOKE, "--config.network=mlp"], ["config.network='mlp'", "one of its fields"]),
    ([SMOKE, "--config.steps.x=1"], ["config.steps is a value"]),
    (["--config", "configs/nothing.py"], ["--config='configs/nothing.py' is no file"]),
    (["--config", "configs/toy2d.py:smok"], ["'smok'", "did you mean 'smoke'?"]),
    ([*SPACED, "--config.steps", "abc"], ["config.steps='abc'", "a whole number, such as 4"]),
    ([*SPACED, "--config.network", "mlp"], ["config.network='mlp'", "one of its fields"]),
    ([*SPACED, "--config.stepz", "3"], ["config.stepz='3'", "did you mean config.steps?"]),
    ([SMOKE, "--config.ema.decays.long=x"], ["config.ema.decays.long='x'", "a number"]),
    ([SMOKE, "--config.ema.decays.long=2", "--workdir=x"], ["config.ema.decays.long=2.0", "< 1"]),
    ([SMOKE, "--config.ema.decays.a-b=0"], ["config.ema.decays.a-b='0'", "letters, digits"]),
    (
        [SMOKE, "--config.parameter_groups.a.rat=1"],
        ["config.parameter_groups.a.rat=", "no field", "a pattern, and a rate"],
    ),
    ([SMOKE], ["--workdir is missing"]),
    (["--workdir=x"], ["--config is missing"]),
    ([SMOKE, "--workdir=x", "steps=3"], ["argument 'steps=3' is no flag"]),
    ([SMOKE, "--workdir=BELOW_A_FILE"], ["cannot be written: Not a directory"]),
    ([SMOKE, "--workdir=gs://bucket/run"], ["workdir=gs://bucket/run", "object stores", "mount"]),
]


def assert_one_line(result, words, code=78, kind="ConfigError"):
    got, _, err = result
    assert got == code, err
    assert err.count("\n") == 1, err
    assert err.startswith(f"{kind}: ")
    for word in words:
        assert word in err


def test_mistakes_in_flags_end_in_one_line_and_code_78(start_door, tmp_path):
    (tmp_path / "file").write_text("")
    below = str(tmp_path / "file" / "run")
    started = [
        start_door("main", *(a.replace("BELOW_A_FILE", below) for a in arguments))
        for arguments, _ in FLAGS
    ]
    for door, (_, words) in zip(started, FLAGS, strict=True):
        assert_one_line(door.wait(120), words)


def test_mistakes_in_a_config_file_name_its_line(start_door, tmp_path):
    head = "from diffusion_jax import config\ndef get_config():\n    c = config.base()\n"
    cases = {
        f"{head}    c.stepz = 3\n    return c\n": "line 4",
        f"{head}    return 1 / 0\n": "line 4: ZeroDivisionError",
        "def get_config(:\n    pass\n": "line 1: invalid syntax",
        "x = 3\n": "has no function get_config",
        "def get_config(x):\n    return x\n": "missing 1 required positional argument: 'x'",
        "def get_config():\n    pass\n": "get_config returned None; expected a config made from",
        f"{head}    return c.to_dict()\n": "get_config returned {",
        "import nothing_here\n": "line 1: ModuleNotFoundError: No module named 'nothing_here'",
    }
    started = []
    for number, text in enumerate(cases):
        file = tmp_path / f"{number}.py"
        file.write_text(text)
        for flag in ([f"--config={file}"], ["--config", str(file)]):
            started.append(start_door("main", *flag, f"--workdir={tmp_path}/run"))
    for number, words in enumerate(cases.values()):
        for door in started[2 * number : 2 * number + 2]:
            assert_one_line(door.wait(120), [words])


def test_a_field_is_unknown_or_not_by_the_config_that_was_loaded(start_door, tmp_path):
    """A config of another making has other fields than the defaults."""
    file = tmp_path / "other.py"
    text = (
        'from ml_collections import ConfigDict as C\ndef get_config():\n    return C({"a": {}})\n'
    )
    file.write_text(text)
    flags = [f"--config={file}", f"--workdir={tmp_path}/run", "--config.steps=3"]
    assert_one_line(start_door("main", *flags).wait(120), ["config has no field 'steps'; known: a"])


def test_mistakes_at_the_sampling_door(start_door, trained, tmp_path):
    out = f"--out={tmp_path}/out"
    cases = [
        ([f"--workdir={tmp_path}/none", f"--out={tmp_path}/none/out"], ["/none does not exist"]),
        ([f"--workdir={trained}", out, "--labels=0,7"], ["labels=7", "0..1"]),
        ([f"--workdir={trained}", out, "--labels=zero"], ["--labels='zero'", "integers"]),
        ([f"--workdir={trained}", out, "--solver=heunn"], ["solver='heunn'", "'heun'"]),
        ([f"--workdir={trained}", out, "--stepps=1"], ["--stepps is no flag"]),
        ([f"--workdir={trained}", f"--out={__file__}/x"], ["cannot be written"]),
        ([f"--workdir={trained}", "--out=gs://bucket/x"], ["out=gs://bucket/x", "object stores"]),
        (["--workdir=gs://bucket/run", out], ["workdir=gs:/", "object stores"]),
    ]
    started = [start_door("sample", *arguments) for arguments, _ in cases]
    for door, (_, words) in zip(started, cases, strict=True):
        assert_one_line(door.wait(120), words)
    assert not (tmp_path / "none").exists()
    full = [f"--workdir={trained}", f"--out={tmp_path}/full", "--num=40000"]
    code, _, err = start_door("sample", *full, "--batch_size=40000", file_limit=200_000).wait(120)
    assert_one_line((code, "", err), [f"out={tmp_path}/full cannot be written", "File too large"])
    data = ["--config=configs/mnist.py:smoke", f"--config.data.data_dir={tmp_path}/nothing"]
    result = start_door("main", *data, f"--workdir={tmp_path}/mnist").wait(120)
    assert_one_line(result, [f"{tmp_path}/nothing"], code=65, kind="DataError")


def test_a_real_command_ends_alike(tmp_path):
    """Without any help of the tests: the command that a user types."""
    command = [sys.executable, "-m", "diffusion_jax.main", SMOKE, "--config.batch_size=0"]
    done = subprocess.run(
        [*command, f"--workdir={tmp_path}/run"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[1],
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
    )
    assert_one_line((done.returncode, done.stdout, done.stderr), ["config.batch_size=0"])


@pytest.mark.parametrize(("door", "flag"), [("main", "--config"), ("sample", "--guidance")])
def test_help_lists_the_flags(start_door, door, flag):
    code, out, err = start_door(door, "--help").wait(60)
    assert (code, err) == (0, "")
    assert flag in out
    assert "--workdir" in out


def test_exit_codes(capsys):
    for error, code in ((ConfigError("a\n b"), 78), (DataError("a b"), 65), (Preempted("a b"), 75)):
        with pytest.raises(SystemExit) as left:
            doors.leave(error)
        assert left.value.code == code
        assert capsys.readouterr().err == f"{type(error).__name__}: a b\n"
