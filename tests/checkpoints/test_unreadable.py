"""Checkpoints that are torn, damaged, closed or none: set aside, or named in one line."""

from __future__ import annotations

import logging
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.checkpoints import Checkpointer
from diffusion_jax.errors import ConfigError


def small(value, size=4):
    return {"w": jnp.asarray(np.full(size, value, np.float32)), "step": jnp.int32(value)}


SMALL = jax.eval_shape(lambda: small(0))


def test_what_a_killed_save_left_is_cleared_and_never_restored(tmp_path):
    for name in ("3.orbax-checkpoint-tmp", "4.orbax-checkpoint-tmp-17"):
        (tmp_path / name / "state").mkdir(parents=True)
    with Checkpointer(tmp_path) as checkpointer:  # killed in the first save: a fresh start
        assert checkpointer.latest_step() is None
        checkpointer.save(3, small(3), {})
        checkpointer.wait()
        assert checkpointer.steps() == [3]
    assert [path.name for path in tmp_path.iterdir()] == ["3"]


@pytest.mark.parametrize("what", ["file", "emptied step", "step without metadata"])
def test_a_directory_with_nothing_restorable_is_no_fresh_start(tmp_path, what):
    if what == "file":
        (tmp_path / "model.safetensors").write_text("weights")
        name = "model.safetensors"
    else:
        with Checkpointer(tmp_path) as checkpointer:
            checkpointer.save(3, small(3), {})
        remove(tmp_path / "3" / ("metadata" if what.endswith("metadata") else ""))
        (tmp_path / "3").mkdir(exist_ok=True)
        name = "3"
    for read_only in (False, True):
        with pytest.raises(ConfigError, match=rf"'{tmp_path}' holds {name} but no checkpoint"):
            Checkpointer(tmp_path, read_only=read_only)


def remove(folder):
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


def test_an_incomplete_newest_step_is_set_aside_loudly(tmp_path, caplog):
    with Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, small(step), {})
    remove(tmp_path / "2" / "metadata")
    with caplog.at_level(logging.WARNING), Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_step() == 1
        assert "2 is incomplete: moved to" in caplog.text
        checkpointer.save(2, small(22), {"position": 22})
        checkpointer.wait()
        assert checkpointer.restore(SMALL)[1] == {"position": 22}
    assert (tmp_path / "quarantine" / "2" / "state").is_dir()


def test_damaged_metadata_is_named(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, small(1), {})
    (tmp_path / "1" / "metadata" / "metadata").write_text("{")
    with (
        Checkpointer(tmp_path) as checkpointer,
        pytest.raises(ConfigError, match=r"metadata '.*1/metadata/metadata' cannot be read"),
    ):
        checkpointer.read_metadata()


@pytest.mark.parametrize("text", ["[3]", "7"])
def test_metadata_that_is_no_object_is_named(tmp_path, text):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, small(1), {})
    (tmp_path / "1" / "metadata" / "metadata").write_text(text)
    with (
        Checkpointer(tmp_path) as checkpointer,
        pytest.raises(ConfigError, match=r"metadata '.*1/metadata/metadata' holds .*no JSON obj"),
    ):
        checkpointer.read_metadata()


def test_a_flipped_letter_in_the_tree_is_reported_in_one_line(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, small(1), {})
    tree = tmp_path / "1" / "state" / "_METADATA"
    tree.write_bytes(tree.read_bytes().replace(b"skip_deserialize", b"skip_deserialixe", 1))
    with (
        Checkpointer(tmp_path) as checkpointer,
        pytest.raises(ConfigError, match=r"/1' cannot be read: KeyError: 'skip_deserialize'; exp"),
    ):
        checkpointer.restore(SMALL)


@pytest.mark.parametrize("closed", ["2/state", "2/metadata", "2", "."])
def test_a_step_that_may_not_be_read_is_neither_torn_nor_absent(tmp_path, without_rights, closed):
    folder = tmp_path / "c"
    with Checkpointer(folder) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, small(step), {})
    if os.geteuid() == 0:
        for path in [folder, *folder.rglob("*")]:
            os.chown(path, 65534, -1)
    mode = (folder / closed).stat().st_mode
    (folder / closed).chmod(0)
    named = folder if closed == "." else folder / "2"
    try:
        for read_only in (False, True):
            with (
                without_rights(),
                pytest.raises(ConfigError, match=rf"'{named}.*Permission denied") as error,
            ):
                Checkpointer(folder, read_only=read_only)
            assert "\n" not in str(error.value)
    finally:
        (folder / closed).chmod(mode)
    assert not (folder / "quarantine").exists()
    with Checkpointer(folder, read_only=True) as checkpointer:
        assert checkpointer.steps() == [1, 2]


@pytest.mark.parametrize("part", ["arrays", "tree"])
def test_damage_is_reported_in_one_line_with_the_earlier_steps(tmp_path, part):
    with Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, small(step, size=10_000), {})
    state = tmp_path / "2" / "state"
    damaged = [state / "_METADATA"] if part == "tree" else state.rglob("d/*")
    for path in damaged:
        path.write_bytes(path.read_bytes()[:20])
    wanted = jax.eval_shape(lambda: small(0, size=10_000))
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(
            ConfigError, match=r"/2' cannot be read: .* earlier steps: \[1\]"
        ) as error:
            checkpointer.restore(wanted)
        assert "\n" not in str(error.value)
        assert checkpointer.restore(wanted, 1)[0]["step"] == 1


def test_a_directory_that_cannot_be_written_is_named(tmp_path, without_rights):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"'.*/file/c' cannot be written: Not a directory"):
        Checkpointer(tmp_path / "file" / "c")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    with (
        without_rights(),
        pytest.raises(ConfigError, match=r"'.*/closed' cannot be written: Permission denied"),
    ):
        Checkpointer(closed)
