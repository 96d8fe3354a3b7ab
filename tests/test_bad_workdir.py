"""What is wrong with a workdir, its disk or its cache, and with what is asked of a saved model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from toys import moons

import diffusion_jax
from diffusion_jax import api, data, start, workdir
from diffusion_jax.data.identity import fingerprint
from diffusion_jax.errors import ConfigError, DataError

pytestmark = pytest.mark.usefixtures("quick_programs")


@pytest.fixture
def copy(moons_run, tmp_path):
    return Path(shutil.copytree(moons_run, tmp_path / "copy"))


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
    config = moons(seed=3, network__mlp__width=16)
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
        diffusion_jax.train(moons(steps=2), copy)
    assert str(copy) in str(error.value)
    assert "train_examples: 65535 -> 65536" in str(error.value)
    assert "data_spec.classes: ('left', 'right') -> " in str(error.value)
    assert snapshot(copy) == before


def test_other_examples_of_the_same_number(copy):
    config = moons(steps=2)
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
    config = moons(network__dit__dim=64)
    assert int(diffusion_jax.train(config, copy).step) == 1


def test_a_checkpoint_of_another_architecture(copy):
    edit(copy, network__mlp__width=16)
    config = moons(network__mlp__width=16)
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
    for act in (lambda: diffusion_jax.load(copy), lambda: diffusion_jax.train(moons(), copy)):
        with pytest.raises(ConfigError, match=r"config\.json cannot be read: Expecting value"):
            act()
    (copy / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"holds checkpoints but no config\.json"):
        diffusion_jax.train(moons(), copy)


def test_a_workdir_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written: Not a directory"):
        diffusion_jax.train(moons(), tmp_path / "file" / "run")
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
def test_mistakes_in_sampling(moons_run, options, words):
    with pytest.raises(ConfigError) as error:
        diffusion_jax.load(moons_run).sample(**options)
    assert all(word in str(error.value) for word in words)
