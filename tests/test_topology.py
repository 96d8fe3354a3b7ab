"""One run on one device, on eight, and on two processes with four each."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import diffusion_jax
from diffusion_jax import best_checkpoint, builders, workdir
from diffusion_jax import config as configs
from diffusion_jax.api import Run
from diffusion_jax.config import differences
from diffusion_jax.evaluation.features import self_trained
from diffusion_jax.feature_networks import feature_network

STEPS, BATCH = 8, 16
OPTIONS = (
    "--config=configs/toy2d.py:smoke",
    "--config.logging.tensorboard=False",
    "--config.logging.every=1",
    "--config.checkpoint.every=4",
    # Small enough for the parameters of the little network to be sharded.
    "--config.mesh.fsdp_min_size=16",
    f"--config.steps={STEPS}",
)
SHARDED = ("--config.mesh.data=2", "--config.mesh.fsdp=4")
# Of a number of examples that fills neither the last batch nor the devices.
SCORED = (
    "--config.evaluation.metrics=bpd",
    "--config.evaluation.every=4",
    "--config.evaluation.num=21",
    "--config.evaluation.best=bpd",
)


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [row["train/loss"] for row in rows(folder) if "train/loss" in row]


def scores(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]


def ids_of(file: Path) -> dict[int, list[int]]:
    found = [json.loads(line) for line in file.read_text().splitlines()]
    return {row["position"]: row["ids"] for row in found}


def pair_environment(process: int, address: str) -> dict[str, object]:
    return {
        "DIFFUSION_JAX_COORDINATOR": address,
        "DIFFUSION_JAX_NUM_PROCESSES": 2,
        "DIFFUSION_JAX_PROCESS_ID": process,
        "DIFFUSION_JAX_CPU_DEVICES": 4,
    }


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def start_pair(start_door, folder: Path, *options: str, ids: str = "pair", workdirs=None):
    address = free_address()
    return [
        start_door(
            "main",
            *OPTIONS,
            *SHARDED,
            f"--workdir={(workdirs or [folder] * 2)[process]}",
            *options,
            ids=folder.with_name(f"{ids}{process}.ids"),
            **pair_environment(process, address),
        )
        for process in range(2)
    ]


@pytest.fixture(scope="module")
def eight(start_door, tmp_path_factory):
    """A run of one process on 2 x 4 devices."""
    folder = tmp_path_factory.mktemp("topology") / "eight"
    arguments = [*OPTIONS, *SHARDED, *SCORED, f"--workdir={folder}"]
    ids = folder.with_suffix(".ids")
    code, _, err = start_door("main", *arguments, ids=ids, DIFFUSION_JAX_CPU_DEVICES=8).wait(120)
    assert code == 0, err
    return folder


def restored(folder: Path, data: int, fsdp: int):
    config = workdir.read_config(folder)
    config.mesh.data, config.mesh.fsdp = data, fsdp
    run = Run.build(config, folder)
    state, _ = run.checkpoints.restore(run.compiled.abstract_state)
    run.checkpoints.close()
    return state


def test_a_save_on_2_x_4_devices_restores_on_any_mesh(eight):
    first = restored(eight, 2, 4)
    kernels = [leaf for leaf in jax.tree.leaves(first.params) if leaf.size >= 256]
    assert kernels
    for leaf in kernels:
        assert leaf.addressable_shards[0].data.size == leaf.size // 4
    for shape in ((8, 1), (1, 8), (4, 2)):
        other = restored(eight, *shape)
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_a_run_of_eight_devices_goes_on_with_one(start_door, eight, tmp_path):
    """Against a run on one device from the start: same ids, same losses but for rounding."""
    one, moved = tmp_path / "one", tmp_path / "moved"
    shutil.copytree(eight, moved)
    shutil.rmtree(moved / "checkpoints" / str(STEPS))
    single = ("--config.mesh.data=1", "--config.mesh.fsdp=1")
    for folder in (one, moved):
        ids = folder.with_suffix(".ids")
        door = start_door("main", *OPTIONS, *SCORED, *single, f"--workdir={folder}", ids=ids)
        code, out, err = door.wait(120)
        assert code == 0, err
    assert "resumed from step 4 of" in out
    assert sorted(ids_of(moved.with_suffix(".ids"))) == [n * BATCH for n in range(4, STEPS)]
    assert ids_of(moved.with_suffix(".ids")).items() <= ids_of(one.with_suffix(".ids")).items()
    assert ids_of(one.with_suffix(".ids")) == ids_of(eight.with_suffix(".ids"))
    np.testing.assert_allclose(losses(one), losses(eight), rtol=1e-5)
    np.testing.assert_allclose(losses(moved), losses(eight), rtol=1e-5)
    same_scores(moved, eight)


def same_scores(folder: Path, other: Path) -> None:
    """Scores during a training, and the best checkpoint, but for rounding and for how long."""
    pairs = list(zip(scores(folder), scores(other), strict=True))
    assert [row["step"] for row, _ in pairs if row["score"] == "bits/dim"] == [4, 8]
    for row, one in pairs:
        assert (row["score"], row["step"], row["n"]) == (one["score"], one["step"], one["n"])
        np.testing.assert_allclose(row["value"], one["value"], rtol=1e-4)
        np.testing.assert_allclose(row["standard_error"], one["standard_error"], rtol=1e-3)
    best = [best_checkpoint.read(one) for one in (folder, other)]
    assert best[0]
    assert best[1]
    assert best[0]["step"] == best[1]["step"]


GLOO = (
    r"\[Gloo\] Rank |\d+| is connected to "
    r"| peer ranks\. Expected number of connected peer ranks is : |\n"
)


def test_two_processes_train_as_one(start_door, eight, tmp_path):
    folder = tmp_path / "pair"
    results = [door.wait(120) for door in start_pair(start_door, folder, *SCORED)]
    assert [code for code, _, _ in results] == [0, 0], results
    # Only process 0 shows and writes anything; Gloo's threads mix the pieces of their lines.
    assert re.sub(GLOO, "", results[1][1]) == ""
    assert results[1][2] == ""
    assert "8 steps done" in results[0][1]
    np.testing.assert_allclose(losses(folder), losses(eight), rtol=1e-5)
    assert [row["step"] for row in rows(folder)] == [row["step"] for row in rows(eight)]
    values = [
        [row["val/loss_ema"] for row in rows(f) if "val/loss_ema" in row] for f in (folder, eight)
    ]
    np.testing.assert_allclose(*values, rtol=1e-5)
    same_scores(folder, eight)
    parts = [ids_of(tmp_path / f"pair{process}.ids") for process in range(2)]
    together = {at: parts[0][at] + parts[1][at] for at in parts[0]}
    assert together == ids_of(eight.with_suffix(".ids"))
    assert not differences(workdir.read_config(folder), workdir.read_config(eight))

    code, _, err = start_door(
        "sample", f"--workdir={folder}", f"--out={tmp_path}/out", "--num=5", "--solver=ddim"
    ).wait(120)
    assert code == 0, err
    with np.load(tmp_path / "out" / "samples.npz") as samples:
        assert samples["x"].shape == (5, 2)
        assert np.isfinite(samples["x"]).all()


def test_one_of_two_processes_writes_the_samples(start_door, eight, tmp_path):
    address, options = free_address(), (f"--workdir={eight}", "--num=5", "--steps=2")
    doors = [
        start_door("sample", *options, f"--out={tmp_path}/{p}", **pair_environment(p, address))
        for p in range(2)
    ]
    results = [door.wait(120) for door in doors]
    assert [code for code, _, _ in results] == [0, 0], results
    assert (tmp_path / "0" / "samples.npz").exists()
    assert not (tmp_path / "1").exists()


def test_two_processes_find_the_bits_of_one(start_door, eight):
    """Of a number of examples that fills neither the last batch nor the devices."""
    arguments = [f"--workdir={eight}", "--num=37", "--batch_size=16", "--seed=3"]
    one = start_door("evaluate", *arguments, DIFFUSION_JAX_CPU_DEVICES=8)
    address = free_address()
    pair = [start_door("evaluate", *arguments, **pair_environment(p, address)) for p in range(2)]
    results = [door.wait(120) for door in (one, *pair)]
    assert [code for code, _, _ in results] == [0, 0, 0], results
    # Only process 0 says them.
    assert re.sub(GLOO, "", results[2][1]) == ""
    figures = re.compile(r"^(-?[0-9.]+) \+- ([0-9.]+) (.*)$", re.MULTILINE)
    found = [figures.findall(out) for _, out, _ in results[:2]]
    assert "n=37 against" in found[0][0][2]
    assert [row[2] for row in found[0]] == [row[2] for row in found[1]]
    values = [[[float(number) for number in row[:2]] for row in rows] for rows in found]
    np.testing.assert_allclose(*values, rtol=1e-5, atol=2e-4)


def pictures():
    config = configs.base()
    config.data.name, config.network.name = "digits", "dit"
    config.network.dit.update(patch=4, dim=16, depth=1, heads=2)
    config.optimizer.warmup_steps = 0
    config.steps, config.batch_size = 2, 16
    config.logging.tensorboard = False
    config.validation.examples = 0
    config.sampling.update(solver="ddim", steps=2, num=8, batch_size=8)
    # Small enough for the parameters of the little network to be sharded.
    config.mesh.update(data=2, fsdp=4, fsdp_min_size=16)
    return config


@pytest.mark.slow
def test_two_processes_judge_pictures_as_one(
    start_door, quick_programs, monkeypatch, tmp_path_factory
):
    """Each with a disk of its own, and a number of samples that fills neither batch nor devices."""
    root = tmp_path_factory.mktemp("judged")
    diffusion_jax.train(pictures(), root / "pair")
    shutil.copytree(root / "pair", root / "one")
    kept = [root / f"home{number}" / "diffusion_jax" / "evaluation" for number in range(3)]
    monkeypatch.setattr(self_trained, "STEPS", 20)
    source = builders.source(pictures(), "train")
    for folder in (kept[0], kept[2]):
        feature_network("self", pictures(), source, folder, lambda text: None)
    flags = ["--metrics=fd,kid,nearest", "--num=37", "--batch_size=16", "--seed=3"]
    address = free_address()
    doors = [
        start_door(
            "evaluate",
            f"--workdir={root}/pair",
            *flags,
            **pair_environment(p, address),
            XDG_CACHE_HOME=root / f"home{p}",
        )
        for p in range(2)
    ]
    alone = {"DIFFUSION_JAX_CPU_DEVICES": 8, "XDG_CACHE_HOME": root / "home2"}
    doors.append(start_door("evaluate", f"--workdir={root}/one", *flags, **alone))
    results = [door.wait(240) for door in doors]
    assert [code for code, _, _ in results] == [0, 0, 0], results
    # Only process 0 shows and writes: the other took the weights and the reference from it.
    assert re.sub(GLOO, "", results[1][1]) == ""
    assert results[1][2] == ""
    assert not kept[1].exists()
    names = sorted(path.name for path in kept[2].iterdir())
    assert sorted(path.name for path in kept[0].iterdir()) == names
    assert len(names) == 2
    found = [
        [json.loads(line) for line in (root / name / "eval.jsonl").read_text().splitlines()]
        for name in ("pair", "one")
    ]
    scores = ["FD-self", "KID-self", "memorisation-self"]
    assert [[row["score"] for row in rows] for rows in found] == [scores] * 2
    assert (root / "pair" / "evaluation" / "nearest_00000002.png").exists()
    for pair, one in zip(*found, strict=True):
        assert pair["n"] == one["n"] == 37
        for name in ("value", "standard_error"):
            np.testing.assert_allclose(pair[name], one[name], rtol=1e-3, atol=1e-6)
        for name in ("weights_hash", "reference_hash", "evaluations", "features"):
            assert pair[name] == one[name]


@pytest.mark.slow
def test_sigterm_of_one_process_saves_both(start_door, tmp_path):
    folder = tmp_path / "pair"
    pair = start_pair(start_door, folder, *SCORED, "--config.steps=100000")
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or not losses(folder):
        assert time.monotonic() < deadline
        assert pair[0].running
        time.sleep(0.02)
    pair[1].signal(signal.SIGTERM)
    results = [door.wait(120) for door in pair]
    assert [code for code, _, _ in results] == [75, 75], results
    last = {err.splitlines()[-1] for _, _, err in results}
    assert len(last) == 1
    step = int((folder / ".saved").read_text())
    assert last.pop().endswith(f"saved step {step}; start me again")
    assert (folder / "checkpoints" / str(step) / "state" / "_METADATA").exists()


@pytest.mark.parametrize("failing", [0, 1])
def test_a_process_that_fails_alone_ends_with_its_code(start_door, tmp_path, failing):
    """Its workdir cannot be written; the other says so, too."""
    (tmp_path / "file").write_text("")
    began = time.monotonic()
    folders = [tmp_path / "good", tmp_path / "good"]
    folders[failing] = tmp_path / "file" / "run"
    pair = start_pair(start_door, tmp_path / "pair", workdirs=folders)
    results = [door.wait(120) for door in pair]
    assert [code for code, _, _ in results] == [78, 78], results
    assert "ConfigError: workdir=" in results[failing][2]
    said = f"ConfigError: process {failing} of the run: workdir={folders[failing]} cannot be"
    assert said in results[1 - failing][2]
    assert time.monotonic() - began < 60


def test_workdirs_of_their_own_are_refused(start_door, eight, tmp_path):
    """On disks of the nodes one process would resume and the other start: together, and wrong."""
    resumed, empty, other = (tmp_path / name for name in ("resumed", "empty", "other"))
    shutil.copytree(eight, resumed)
    more = f"--config.steps={STEPS + 4}"
    pairs = [
        start_pair(start_door, tmp_path / "a", more, workdirs=[resumed, empty]),
        start_pair(start_door, tmp_path / "b", more, workdirs=[empty, other]),
    ]
    shown = [
        f"{resumed} with step {STEPS} in process 0, {empty} with no checkpoint in process 1",
        f"{empty} with no checkpoint in process 0, {other} with no checkpoint in process 1",
    ]
    for pair, words in zip(pairs, shown, strict=True):
        for code, _, err in [door.wait(120) for door in pair]:
            assert code == 78, err
            assert err.count("\n") == 1, err
            assert f"ConfigError: workdir is not the same folder in all processes: {words}" in err
            assert "file system that all share" in err
    assert rows(resumed) == rows(eight)
    assert not (other / "checkpoints").exists()


def test_configs_of_their_own_are_refused(start_door, tmp_path):
    address = free_address()
    pair = [
        start_door(
            "main",
            *OPTIONS,
            *SHARDED,
            f"--workdir={tmp_path}/run",
            f"--config.seed={process}",
            f"--config.logging.every={1 + process}",
            **pair_environment(process, address),
        )
        for process in range(2)
    ]
    for code, _, err in [door.wait(120) for door in pair]:
        assert code == 78, err
        assert err == (
            "ConfigError: config.seed: 0 in process 0, 1 in process 1; start every process with "
            "the same config and flags\n"
        )


def test_a_mistake_ends_both_processes_at_once(start_door, tmp_path):
    began = time.monotonic()
    pair = start_pair(start_door, tmp_path / "pair", "--config.batch_size=12")
    results = [door.wait(120) for door in pair]
    assert [code for code, _, _ in results] == [78, 78], results
    assert all("config.batch_size=12" in err for _, _, err in results)
    assert time.monotonic() - began < 60
