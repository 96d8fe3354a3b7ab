"""Killed, preempted, extended: whatever happens to a run, its end is that of one left in peace."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from diffusion_jax import workdir
from diffusion_jax.api import Run
from diffusion_jax.training.state import position

STEPS, BATCH = 120, 16
OPTIONS = (
    "--config=configs/toy2d.py:smoke",
    "--config.logging.tensorboard=False",
    "--config.logging.every=5",
    "--config.checkpoint.every=5",
    "--config.validation.every=30",
)


def arguments(folder: Path, *more: str, steps: int = STEPS) -> list[str]:
    return [*OPTIONS, f"--config.steps={steps}", f"--workdir={folder}", *more]


def read(folder: Path):
    """The newest state, whole, and its metadata."""
    config = workdir.read_config(folder)
    run = Run.build(config, folder)
    state, metadata = run.checkpoints.restore(run.compiled.abstract_state)
    run.checkpoints.close()
    return state, metadata


def assert_same_bits(a, b) -> None:
    """Every leaf of params, optimizer, guard, averages, extra, step and examples."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        same = np.asarray(x).tobytes() == np.asarray(y).tobytes()
        assert same, jax.tree_util.keystr(path)


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_times(folder: Path) -> list[dict]:
    timed = ("second", "wait", "memory", "mfu")
    return [
        {k: v for k, v in row.items() if not any(t in k for t in timed)} for row in rows(folder)
    ]


def taken(file: Path) -> list[tuple[int, list[int]]]:
    """(position, ids) of every batch that a loop took; the last line may be torn by a kill."""
    found = []
    for line in file.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        found.append((row["position"], row["ids"]))
    return found


@pytest.fixture(scope="module")
def reference(start_door, tmp_path_factory):
    """A run left in peace: (folder, ids by position)."""
    folder = tmp_path_factory.mktemp("reference")
    ids = folder.with_suffix(".ids")
    code, _, err = start_door("main", *arguments(folder), ids=ids).wait()
    assert code == 0, err
    by_position = dict(taken(ids))
    assert sorted(by_position) == list(range(0, STEPS * BATCH, BATCH))
    return folder, by_position


def wait_until(condition, door, timeout=60.0) -> None:
    deadline = time.monotonic() + timeout
    while door.running and not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def assert_same_end(folder: Path, reference: Path) -> None:
    state, metadata = read(folder)
    expected, expected_metadata = read(reference)
    assert_same_bits(state, expected)
    assert int(state.step) == STEPS
    assert position(state.examples) == STEPS * BATCH
    assert metadata == expected_metadata == {"step": STEPS, "examples": STEPS * BATCH}
    assert without_times(folder) == without_times(reference)


def test_kill_9_at_random_moments_ends_in_the_same_bits(start_door, reference, tmp_path):
    whole, ids_by_position = reference
    seed = time.time_ns()
    print("seed", seed)
    draw = random.Random(seed)
    folder = tmp_path / "run"
    code, kills, resumed, saved = None, 0, 0, 0
    for life in range(5):
        ids = tmp_path / f"{life}.ids"
        # Every second time at a step that ends in a save. Once the save of the tenth step has
        # started, that of the fifth is whole: each life but the first has one to go on from.
        batches = 15 if life % 2 else draw.randrange(11, 19)
        kill = (batches, draw.uniform(0, 0.05)) if life < 4 else None
        door = start_door("main", *arguments(folder), ids=ids, kill=kill)
        code, out, err = door.wait()
        assert code in (0, -9), err
        kills += code == -9
        life_took = taken(ids) if ids.exists() else []
        if life_took and saved:
            assert f"resumed from step {life_took[0][0] // BATCH} of" in out
            resumed += 1
        if life_took:
            assert life_took[0][0] >= saved * BATCH
        for number, (at, seen) in enumerate(life_took):
            assert at == life_took[0][0] + number * BATCH
            assert seen == ids_by_position[at]
        names = [path.name for path in folder.glob("checkpoints/*")]
        saved = max((int(name) for name in names if name.isdigit()), default=0)
        if code == 0:
            break
    assert code == 0
    assert kills >= 3
    assert resumed == life
    assert_same_end(folder, whole)


def assert_next_start_ends_alike(start_door, folder, step, undisturbed):
    code, out, err = start_door("main", *arguments(folder)).wait()
    assert code == 0, err
    assert f"resumed from step {step} of" in out
    assert_same_bits(read(folder)[0], read(undisturbed)[0])


def test_sigterm_saves_and_the_next_start_ends_in_the_same_bits(start_door, reference, tmp_path):
    folder = tmp_path / "run"
    door = start_door("main", *arguments(folder))
    wait_until(lambda: (folder / "metrics.jsonl").exists() and rows(folder), door)
    door.signal(signal.SIGTERM)
    code, _, err = door.wait()
    assert code == 75, err
    last = err.splitlines()[-1]
    state, metadata = read(folder)
    assert 5 <= metadata["step"] < STEPS
    assert last.endswith(f"saved step {metadata['step']}; start me again")
    assert last.startswith("Preempted: ")
    assert int(state.step) == metadata["step"]
    assert_next_start_ends_alike(start_door, folder, metadata["step"], reference[0])


def torn(folder: Path) -> bool:
    return any("tmp" in path.name for path in folder.glob("checkpoints/*"))


MOMENTS = {
    # The config is written just before the step is compiled.
    "compiling": lambda folder: (folder / "config.json").exists(),
    # The row of the step is written just before its validation.
    "validating": lambda folder: (folder / "metrics.jsonl").exists() and bool(rows(folder)),
    "saving": torn,
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_sigterm_in_the_middle_of_something(start_door, reference, tmp_path, moment):
    folder = tmp_path / "run"
    long = ("--config.validation.every=5", "--config.validation.examples=10000")
    options = long if moment == "validating" else ()
    # Nothing is compiled yet in a cache of its own.
    cache = {"JAX_COMPILATION_CACHE_DIR": tmp_path / "cache"} if moment == "compiling" else {}
    door = start_door("main", *arguments(folder, *options), **cache)
    wait_until(lambda: MOMENTS[moment](folder), door)
    door.signal(signal.SIGTERM)
    code, _, err = door.wait()
    assert code == 75, err
    saved = int((folder / ".saved").read_text())
    assert err.splitlines()[-1].endswith(f"saved step {saved}; start me again")
    assert saved < STEPS
    assert not torn(folder)
    assert_next_start_ends_alike(start_door, folder, saved, reference[0])


@pytest.mark.slow
def test_ctrl_c_ends_in_one_line(start_door, tmp_path):
    folder = tmp_path / "run"
    door = start_door("main", *arguments(folder))
    wait_until(lambda: (folder / "metrics.jsonl").exists() and rows(folder), door)
    door.signal(signal.SIGINT)
    code, _, err = door.wait()
    assert code == 130, err
    assert err.splitlines()[-1] == "interrupted: what is saved stands; the same command goes on"
    assert "Traceback" not in err


def test_a_finished_run_is_left_as_it_is_and_a_larger_steps_extends_it(
    start_door, reference, tmp_path
):
    folder = tmp_path / "run"
    shutil.copytree(reference[0], folder)
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}
    code, out, err = start_door("main", *arguments(folder)).wait()
    assert (code, err) == (0, "")
    assert f"step {STEPS} of config.steps={STEPS} is reached already" in out
    after = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}
    assert after == before

    ids = tmp_path / "ids"
    code, _, err = start_door("main", *arguments(folder, steps=STEPS + 10), ids=ids).wait()
    assert code == 0, err
    assert [at for at, _ in taken(ids)] == [(STEPS + n) * BATCH for n in range(10)]
    state, _ = read(folder)
    assert int(state.step) == STEPS + 10
    assert workdir.read_config(folder).steps == STEPS + 10
    steps = [row["step"] for row in rows(folder) if "train/loss" in row]
    assert steps == list(range(5, STEPS + 11, 5))


@pytest.mark.parametrize("loss", ["checkpoints emptied", "checkpoints gone", "step torn"])
def test_lost_checkpoints_never_start_the_run_afresh(start_door, reference, tmp_path, loss):
    folder = tmp_path / "run"
    shutil.copytree(reference[0], folder)
    checkpoints = folder / "checkpoints"
    if loss == "checkpoints emptied":
        for step in checkpoints.iterdir():
            shutil.rmtree(step)
    elif loss == "checkpoints gone":
        shutil.rmtree(checkpoints)
    else:
        for file in checkpoints.glob("*/state/_METADATA"):
            file.unlink()
    metrics = (folder / "metrics.jsonl").read_bytes()
    code, out, err = start_door("main", *arguments(folder)).wait()
    assert code == 78, out + err
    assert err.count("\n") == 1
    assert err.startswith("ConfigError: ")
    assert "checkpoint" in err
    assert (folder / "metrics.jsonl").read_bytes() == metrics


def test_lost_checkpoints_are_noticed_after_the_first_save(start_door, tmp_path):
    folder = tmp_path / "run"
    options = ("--config.checkpoint.every=2000", "--config.logging.every=500")
    door = start_door("main", *arguments(folder, *options, steps=10**6))
    # Noted long before the second save, or the close, would do it.
    wait_until((folder / ".saved").exists, door)
    door.signal(signal.SIGKILL)
    assert door.wait()[0] == -9
    assert (folder / ".saved").read_text() == "2000\n"
    assert not list(folder.glob("checkpoints/4000*"))
    metrics = (folder / "metrics.jsonl").read_bytes()
    for step in (folder / "checkpoints").iterdir():
        shutil.rmtree(step)
    for loss in ("emptied", "gone"):
        if loss == "gone":
            (folder / "checkpoints").rmdir()
            (folder / ".saved").unlink()
        code, out, err = start_door("main", *arguments(folder, *options, steps=10**6)).wait()
        assert code == 78, out + err
        assert err.count("\n") == 1
        assert f"put {folder}/checkpoints back" in err
        assert (folder / "metrics.jsonl").read_bytes() == metrics


@pytest.mark.slow
def test_another_batch_size_goes_on_in_the_same_sequence(start_door, tmp_path):
    folder, ids = tmp_path / "run", tmp_path / "ids"
    once = tmp_path / "once"
    shown = []
    for start, batch in ((0, 16), (6, 8)):
        options = [f"--config.batch_size={batch}", "--config.optimizer.schedule=constant"]
        door = start_door("main", *arguments(folder, *options, steps=6 + start), ids=ids)
        assert door.wait()[0] == 0
        shown = taken(ids)
    assert [at for at, _ in shown] == [*range(0, 96, 16), *range(96, 144, 8)]
    door = start_door("main", *arguments(once, options[1], steps=9), ids=tmp_path / "other")
    assert door.wait()[0] == 0
    assert [i for _, seen in shown for i in seen] == [
        i for _, seen in taken(tmp_path / "other") for i in seen
    ]
