"""Damaged checkpoints and full disks, at the doors: one line, whatever the libraries say."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import diffusion_jax

pytestmark = pytest.mark.usefixtures("quick_programs")

# Many arrays: where one fails, others are still under way.
OPTIONS = (
    "--config=configs/toy2d.py:smoke",
    "--config.logging.tensorboard=False",
    "--config.validation.examples=0",
    "--config.network.mlp.depth=8",
)


@pytest.fixture(scope="module")
def trained(start_door, tmp_path_factory):
    folder = tmp_path_factory.mktemp("damage") / "run"
    code, _, err = start_door("main", *OPTIONS, f"--workdir={folder}").wait(120)
    assert code == 0, err
    return folder


def assert_one_line(result, *words):
    """Beside the progress of a run."""
    code, _, err = result
    lines = [line for line in err.splitlines() if not line.startswith(("train step", "step "))]
    assert code == 78, err
    assert len(lines) == 1, err
    assert lines[0].startswith("ConfigError: ")
    for word in words:
        assert word in lines[0]


def cut(folder: Path, smallest: int) -> None:
    """Halves the files of arrays; the small ones are the index."""
    files = folder.glob("checkpoints/*/state/**/d/*")
    large = [path for path in files if path.stat().st_size >= smallest]
    assert large
    for path in large:
        os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(("door", "smallest"), [("main", 15_000), ("main", 0), ("sample", 15_000)])
def test_cut_arrays(start_door, trained, tmp_path, door, smallest):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    cut(folder, smallest)
    options = (*OPTIONS, "--config.steps=8") if door == "main" else (f"--out={tmp_path}/out",)
    for _ in range(2):  # which of the reads fails first is chance
        result = start_door(door, *options, f"--workdir={folder}").wait(120)
        assert_one_line(result, f"'{folder}/checkpoints/4' cannot be read: ", "earlier steps: []")


def test_a_save_that_fails_beside_the_training_ends_it_before_the_next(start_door, tmp_path):
    folder = tmp_path / "run"
    # Between two saves lie seconds, since the steps are large.
    intervals = ("--config.checkpoint.every=300", "--config.logging.every=10")
    sizes = ("--config.steps=1000000", "--config.network.mlp.width=256")
    options = (*OPTIONS[:3], *intervals, *sizes)
    door = start_door("main", *options, f"--workdir={folder}", file_limit=2_000_000)
    assert_one_line(door.wait(120), "could not be written: File too large")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert 300 <= rows[-1]["step"] < 600


def test_a_full_disk_leaves_earlier_checkpoints(start_door, trained, tmp_path):
    """A limit on the size of a file stands in for a full disk: writing fails midway."""
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    options = (*OPTIONS, f"--workdir={folder}", "--config.steps=8")
    files = [path for path in (folder / "checkpoints").rglob("*") if path.is_file()]
    whole = {path: path.read_bytes() for path in files}
    result = start_door("main", *options, file_limit=2000).wait()
    assert_one_line(result, "File too large")
    assert {path: path.read_bytes() for path in whole} == whole
    assert len(diffusion_jax.load(folder).sample(3)) == 3
    assert start_door("main", *options).wait()[0] == 0


@pytest.fixture
def small_disk(tmp_path):
    """512 KiB, where mounting is allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_really_full(start_door, trained, small_disk):
    folder = small_disk / "run"
    options = (*OPTIONS, "--config.checkpoint.every=1")
    result = start_door("main", *options, f"--workdir={folder}").wait(120)
    # The checkpoint or a row of metrics, whichever comes first.
    assert_one_line(result, str(folder), "be written: No space left on device")


LEFT_BEHIND = """
import asyncio, gc, logging
from diffusion_jax import doors
doors._quiet()
class Late:
    def __init__(self, error): self.error = error
    def __del__(self): raise self.error
Late(RuntimeError("Event loop is closed"))
logging.getLogger("asyncio").error("Task exception was never retrieved")
async def wait(): pass
wait()
gc.collect()
print("silent so far", file=__import__("sys").stderr)
Late(RuntimeError("mine"))
"""


def test_only_what_nobody_waits_for_is_dropped():
    done = subprocess.run(
        [sys.executable, "-c", LEFT_BEHIND], capture_output=True, text=True, timeout=60
    )
    lines = done.stderr.splitlines()
    assert lines[0] == "silent so far"
    assert lines[-1] == "RuntimeError: mine"
