"""A dry run shows what a run would be and leaves the workdir as good as new."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from diffusion_jax import workdir
from diffusion_jax.api import Run

OPTIONS = (
    "--config=configs/digits.py:smoke",
    "--config.logging.tensorboard=False",
    "--config.validation.examples=0",
    # A fifth of the U-Net's time to compile, and nothing here is about the network.
    "--config.network.name=dit",
    "--config.network.dit.dim=16",
    "--config.network.dit.heads=2",
    "--config.network.dit.depth=1",
)
PICTURES = ("batch.png", "schedule.png", "time_sampling.png")


def contents(folder: Path) -> dict[str, bytes]:
    """Of all files but the pictures of a dry run."""
    found = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    return {k: p.read_bytes() for k, p in found.items() if not k.startswith(workdir.DRY_RUN)}


def assert_pictures(folder: Path, names=PICTURES) -> None:
    assert sorted(p.name for p in (folder / workdir.DRY_RUN).iterdir()) == sorted(names)
    for name in names:
        with Image.open(folder / workdir.DRY_RUN / name) as image:
            pixels = np.asarray(image)
        assert min(pixels.shape[:2]) > 100
        assert pixels.std() > 10, name


def number_after(text: str, words: str) -> int:
    return int(re.search(re.escape(words) + r"\s+([\d,]+)", text)[1].replace(",", ""))


@pytest.fixture(scope="module")
def tried(start_door, tmp_path_factory):
    """A workdir after a dry run and then a real one, and what the dry run printed."""
    folder = tmp_path_factory.mktemp("dry") / "run"
    code, out, err = start_door("main", *OPTIONS, f"--workdir={folder}", "--dry_run").wait(120)
    assert code == 0, err
    assert_pictures(folder)
    # No config.json, no checkpoints, no metrics, no lock.
    assert contents(folder) == {}
    code, real, err = start_door("main", *OPTIONS, f"--workdir={folder}").wait(120)
    assert code == 0, err
    assert "4 steps done" in real
    return folder, out


def test_the_parameters_it_counts_are_those_of_the_run(tried):
    folder, out = tried
    run = Run.build(workdir.read_config(folder), folder)
    state, _ = run.checkpoints.restore(run.compiled.abstract_state)
    run.checkpoints.close()
    run.held.release()
    assert number_after(out, "parameters:") == sum(a.size for a in jax.tree.leaves(state.params))
    for name, part in state.params.items():
        size = sum(a.size for a in jax.tree.leaves(part))
        assert number_after(out, f"\n  {name} ") == size, name


def test_it_says_what_the_run_computes_and_reads(tried):
    folder, out = tried
    run = Run.build(workdir.read_config(folder), folder)
    batch = run.abstract_batch(run.loader().batch(0))
    flops = run._loop_options(batch).flops_per_step
    run.checkpoints.close()
    run.held.release()
    shown = re.search(r"compute: ([\d.]+) ([kMGT]?)FLOP a step \(16 examples", out)
    unit = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[shown[2]]
    assert float(shown[1]) * unit == pytest.approx(flops, rel=5e-3)
    assert "data: digits, 1400 examples to train on, 397 held out" in out
    assert "image of shape 8 x 8 x 1, values from -1 to 1" in out
    assert "10 classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9" in out
    assert "the network reads: label" in out
    assert "train step compiled in" in out


def test_a_workdir_with_a_run_is_left_as_it_is(tried, start_door):
    folder, _ = tried
    before = contents(folder)
    arguments = (*OPTIONS, f"--workdir={folder}", "--dry_run")
    code, out, err = start_door("main", *arguments).wait(120)
    assert code == 0, err
    assert f"{folder} would be resumed from step 4 of 4" in out
    assert contents(folder) == before
    assert_pictures(folder)
    # What a resumed run refuses, its dry run refuses.
    code, _, err = start_door("main", *arguments, "--config.seed=7").wait(120)
    assert code == 78
    assert "config.seed: 0 -> 7" in err
    assert contents(folder) == before


def test_weights_to_start_from_are_compared(tried, start_door, tmp_path):
    other = tmp_path / "other"
    arguments = (*OPTIONS, f"--workdir={other}", "--dry_run", f"--config.init_from={tried[0]}")
    code, out, err = start_door("main", *arguments).wait(120)
    assert code == 0, err
    assert f"starts from {tried[0]}, step 4, average 'default'" in out
    taken, count = re.search(r"taken: (\d+) of (\d+) parameters, 100.0%", out).groups()
    assert taken == count
    # Nothing was taken yet.
    assert contents(other) == {}


def test_mistakes_end_as_those_of_a_run_do(start_door, tmp_path):
    started = [
        start_door("main", *OPTIONS, "--dry_run", *more)
        for more in (
            (f"--workdir={tmp_path}/a", "--config.network.name=unett"),
            (f"--workdir={tmp_path}/b", "--config.batch_size=0"),
            (),
        )
    ]
    for door, words in zip(
        started, ("'unett'", "batch_size=0", "--workdir is missing"), strict=True
    ):
        code, _, err = door.wait(120)
        assert code == 78
        assert words in err
        assert err.count("\n") == 1
    assert not (tmp_path / "a" / "config.json").exists()


def test_bits(start_door, tmp_path):
    arguments = ("--config=configs/heartbeat.py:smoke", "--dry_run", f"--workdir={tmp_path}/bits")
    code, out, err = start_door("main", *arguments).wait(180)
    assert code == 0, err
    assert "no conditioning" in out
    assert_pictures(tmp_path / "bits")


def test_two_processes_with_four_devices_each(start_door, tmp_path):
    """Parameters are split by four; one process prints and writes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    pair = [
        start_door(
            "main",
            "--config=configs/toy2d.py:smoke",
            f"--workdir={tmp_path}/pair",
            "--dry_run",
            "--config.mesh.data=2",
            "--config.mesh.fsdp=4",
            "--config.mesh.fsdp_min_size=16",
            DIFFUSION_JAX_COORDINATOR=address,
            DIFFUSION_JAX_NUM_PROCESSES=2,
            DIFFUSION_JAX_PROCESS_ID=process,
            DIFFUSION_JAX_CPU_DEVICES=4,
        )
        for process in range(2)
    ]
    (code, out, err), (other_code, other_out, other_err) = (door.wait(180) for door in pair)
    assert (code, other_code) == (0, 0), err + other_err
    assert not [line for line in other_out.splitlines() if not line.startswith("[Gloo]")]
    assert_pictures(tmp_path / "pair")
    assert "sharding over data 2, fsdp 4:" in out
    whole = number_after(out, "parameters:")
    split = re.search(r"split over fsdp \(4\): \d+ arrays, ([\d,]+) parameters, ([\d,]+) a", out)
    of_split, held = (int(text.replace(",", "")) for text in split.groups())
    assert held == of_split // 4 > 0
    assert number_after(out, "parameters a device:") == whole - of_split + held
