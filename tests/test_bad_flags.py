"""Mistakes at the doors: one line and the code of its kind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffusion_jax import doors, sample_flags
from diffusion_jax.errors import ConfigError, DataError, Preempted

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
    ([SMOKE, "--config.ema.powers=.1"], ["config.ema.powers='.1'", "config.ema.powers.NAME"]),
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


def test_labels_are_numbers_and_names():
    assert sample_flags._labels("3, cat,-1,10th") == [3, "cat", -1, "10th"]
    # What is no whole number is a name, which no class has.
    for text in ("--5", "-", "+5", "1.5", "\N{SUPERSCRIPT TWO}", "9" * 5000):
        assert sample_flags._labels(text) == [text]
    assert sample_flags._labels("") is None


def test_mistakes_at_the_sampling_door(start_door, moons_run, tmp_path):
    out = f"--out={tmp_path}/out"
    cases = [
        ([f"--workdir={tmp_path}/none", f"--out={tmp_path}/none/out"], ["/none does not exist"]),
        ([f"--workdir={moons_run}", out, "--labels=0,7"], ["labels=7", "0..1"]),
        ([f"--workdir={moons_run}", out, "--labels=zero"], ["labels='zero'", "no names", "0..1"]),
        ([f"--workdir={moons_run}", out, "--labels=--5"], ["labels='--5'", "no names", "0..1"]),
        (
            [f"--workdir={moons_run}", out, "--negative_scalars=2", "--guidance=2"],
            ["negative_scalars=[[2.0]]", "not conditioned by scalar"],
        ),
        (
            [f"--workdir={moons_run}", out, "--also_scalars=1,3", "--also_scalars=4,5"],
            ["also_scalars=[[1.0, 3.0]]", "not conditioned by scalar"],
        ),
        ([f"--workdir={moons_run}", out, "--also_scalars=x"], ["--also_scalars='x'", "numbers"]),
        (
            [f"--workdir={moons_run}", out, f"--weak={moons_run}", "--guidance=2"],
            [f"--weak='{moons_run}' has no effect", "expected --guidance_by=autoguidance with it"],
        ),
        (
            [f"--workdir={moons_run}", out, "--weak_ema=", "--guidance_by=autoguidance"],
            ["--weak_ema='' has no effect", "expected --guidance above 1"],
        ),
        ([f"--workdir={moons_run}", out, "--solver=heunn"], ["solver='heunn'", "'heun'"]),
        ([f"--workdir={moons_run}", out, "--stepps=1"], ["--stepps is no flag"]),
        ([f"--workdir={moons_run}", f"--out={__file__}/x"], ["cannot be written"]),
        ([f"--workdir={moons_run}", "--out=gs://bucket/x"], ["out=gs://bucket/x", "object stores"]),
        (["--workdir=gs://bucket/run", out], ["workdir=gs:/", "object stores"]),
    ]
    started = [start_door("sample", *arguments) for arguments, _ in cases]
    for door, (_, words) in zip(started, cases, strict=True):
        assert_one_line(door.wait(120), words)
    assert not (tmp_path / "none").exists()
    full = [f"--workdir={moons_run}", f"--out={tmp_path}/full", "--num=40000"]
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
