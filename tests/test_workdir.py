"""A workdir is opened for one run, of one kind, alike in all its processes."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toys import moons

import diffusion_jax
from diffusion_jax import lock, start, workdir
from diffusion_jax.errors import ConfigError

pytestmark = pytest.mark.usefixtures("quick_programs")

SMOKE = ("--config=configs/toy2d.py:smoke", "--config.logging.tensorboard=False")


@pytest.mark.parametrize("name", ["thesis.tex", "samples/", "metrics.jsonl", "data/"])
def test_a_folder_of_something_else_is_refused(tmp_path, name):
    path = tmp_path / name
    path.mkdir() if name.endswith("/") else path.write_text("{}\n")
    message = rf"workdir={tmp_path} holds {name.rstrip('/')} but no config\.json: .* empty folder"
    with pytest.raises(ConfigError, match=message):
        workdir.prepare(tmp_path, moons())


def test_a_folder_of_a_launcher_or_of_a_run_killed_early_is_not(tmp_path):
    for name in ("slurm-17.out", "job.log", "job.err", ".lock", ".nfs0001", "metrics.jsonl"):
        (tmp_path / name).touch()
    (tmp_path / "events.out.tfevents.1.host").write_text("x")
    for name in ("lost+found", "checkpoints"):
        (tmp_path / name).mkdir()
    assert workdir.prepare(tmp_path, moons()) == tmp_path


def test_a_run_whose_checkpoints_folder_is_gone_never_starts_afresh(moons_run, tmp_path):
    copy = Path(shutil.copytree(moons_run, tmp_path / "copy"))
    (copy / ".saved").unlink()
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(ConfigError, match=rf"workdir={copy} .*no checkpoints; put {copy}/check"):
        diffusion_jax.train(moons(steps=2), copy)
    assert not (copy / "checkpoints").exists()


def test_the_note_of_a_save_is_whole_or_old(tmp_path, monkeypatch):
    """A disk that fills up while it is written must not leave an empty one."""
    workdir.note_saved(tmp_path, 3)

    def full(self, text):
        with self.open("w"):
            raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="full"):
        workdir.note_saved(tmp_path, 4)
    assert (tmp_path / ".saved").read_text() == "3\n"


def test_a_checkpoint_that_contradicts_itself(moons_run, tmp_path):
    for number, text in enumerate(('{"examples": 8}', '{"step": 1, "examples": 9}')):
        copy = Path(shutil.copytree(moons_run, tmp_path / str(number)))
        (copy / "checkpoints" / "1" / "metadata" / "metadata").write_text(text)
        with pytest.raises(ConfigError, match=rf"{copy}/checkpoints/1' contradicts itself: its m"):
            diffusion_jax.train(moons(steps=2), copy)
    copy = Path(shutil.copytree(moons_run, tmp_path / "renamed"))
    (copy / "checkpoints" / "1").rename(copy / "checkpoints" / "7")
    with pytest.raises(ConfigError, match="checkpoints/7' contradicts itself"):
        diffusion_jax.train(moons(steps=8), copy)


def test_the_home_of_the_user(moons_run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(moons_run, tmp_path / "run")
    config = moons()
    config.compute_dtype = "float32"  # as it is kept
    assert workdir.prepare("~/run", config) == tmp_path / "run"
    assert len(diffusion_jax.load("~/run").sample(2)) == 2
    assert not (tmp_path / "~").exists()
    with pytest.raises(ConfigError, match="workdir=~nobody-of-that-name/run: "):
        workdir.prepare("~nobody-of-that-name/run", moons())


def test_the_default_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value, expected in (("", tmp_path / ".cache"), ("/scratch/me", Path("/scratch/me"))):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert start.default_cache() == expected / "diffusion_jax" / "xla"


def test_the_lock_is_let_go_by_training_and_by_every_mistake(moons_run, tmp_path):
    copy = Path(shutil.copytree(moons_run, tmp_path / "copy"))
    diffusion_jax.train(moons(steps=2), copy)
    assert not (copy / ".lock").exists()
    wrong = moons(steps=3)
    wrong.seed = 5
    with pytest.raises(ConfigError, match=r"config\.seed"):
        diffusion_jax.train(wrong, copy)
    wrong = moons(steps=3)
    wrong.batch_size = 12
    with pytest.raises(ConfigError, match="batch_size"):
        diffusion_jax.train(wrong, copy)
    assert not (copy / ".lock").exists()


HOLD = """
import sys
from pathlib import Path
from diffusion_jax import lock
held = lock.take(Path(sys.argv[1]))
print(held.token, flush=True)
sys.stdin.read()
"""


def hold(folder):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    return process, process.stdout.readline().strip()


def test_a_lock_holds_against_other_processes_until_its_own_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 0.1)
    process, token = hold(tmp_path)
    assert lock.token_in(tmp_path) == token
    with pytest.raises(
        ConfigError, match=rf"workdir={tmp_path} is in use by process {process.pid} "
    ):
        lock.take(tmp_path)
    process.kill()
    process.communicate()
    mine = lock.take(tmp_path)  # the file is still there, but nobody holds it
    assert lock.take(tmp_path) is mine
    assert lock.token_in(tmp_path) == mine.token != token
    mine.release()
    assert list(tmp_path.iterdir()) == []
    lock.take(tmp_path)  # nobody keeps it
    assert list(tmp_path.iterdir()) == []


def test_a_lock_waits_for_a_run_that_is_just_ending(tmp_path):
    process, _ = hold(tmp_path)
    process.stdin.close()
    lock.take(tmp_path).release()
    assert process.wait() == 0
    process.stdout.close()


def test_a_file_system_without_locks_costs_a_warning(tmp_path, monkeypatch, capsys):
    def refuse(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    held = lock.take(tmp_path)
    assert lock.token_in(tmp_path) == held.token
    err = capsys.readouterr().err
    assert err.startswith(f"Warning: workdir={tmp_path} cannot be locked (No locks available)")
    assert err.count("\n") == 1
    held.release()


def test_a_second_start_leaves_the_first_alone(start_door, tmp_path):
    folder = tmp_path / "run"
    arguments = (*SMOKE, "--config.steps=1000000", "--config.checkpoint.every=100")
    first = start_door("main", *arguments, f"--workdir={folder}")
    deadline = time.monotonic() + 60
    while not (folder / ".saved").exists():
        assert first.running
        assert time.monotonic() < deadline
        time.sleep(0.02)
    code, _, err = start_door("main", *arguments, f"--workdir={folder}").wait()
    assert (code, err.count("\n")) == (78, 1), err
    assert f"ConfigError: workdir={folder} is in use by process {first.pid} on" in err
    first.signal(signal.SIGTERM)
    code, _, err = first.wait()
    assert code == 75, err
    step = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert err.splitlines()[-1].endswith(f"saved step {step}; start me again")
    assert not (folder / ".lock").exists()
