"""A workdir describes itself: which config made it, with which versions, and where things lie."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import importlib.metadata
import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffusion_jax import config as configs
from diffusion_jax.config import Config
from diffusion_jax.data import DataSpec
from diffusion_jax.errors import ConfigError, check_local

CONFIG_FILE = "config.json"
CHECKPOINTS = "checkpoints"
SAVED_FILE = ".saved"
SAMPLES = "samples"
TRAJECTORY = "trajectory.gif"
PACKAGES = ("diffusion-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def prepare(workdir: str | Path, config: Config) -> Path:
    """Makes or opens a workdir for a run with this config.

    Args:
        workdir: folder; created when missing.
        config: the config asked for.

    Raises:
        ConfigError: the folder cannot be written, holds something else, or was made with a config
            that differs in a field that may not change.
    """
    if not str(workdir):
        raise ConfigError("--workdir is missing; name a folder, such as --workdir=runs/digits")
    check_local("workdir", workdir)
    path = Path(workdir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ConfigError(f"workdir={path} cannot be written: {error.strerror}") from None
    if (path / CONFIG_FILE).exists():
        configs.check_resume(read_config(path), config, str(path))
    elif _has_steps(path / CHECKPOINTS):
        raise ConfigError(
            f"workdir={path} holds checkpoints but no {CONFIG_FILE}; put the file back or name a "
            "new workdir"
        )
    return path


def _has_steps(folder: Path) -> bool:
    return folder.is_dir() and any(entry.name.isdigit() for entry in folder.iterdir())


def note_saved(path: Path, step: int) -> None:
    """Remembers outside the checkpoints that there was one, so that their loss is noticed."""
    (path / SAVED_FILE).write_text(f"{step}\n")


def check_never_saved(path: Path) -> None:
    """For a workdir without checkpoints: training may start at step 0 only if there never was one.

    Raises:
        ConfigError: a checkpoint was saved here and is gone.
    """
    if (path / SAVED_FILE).exists():
        step = (path / SAVED_FILE).read_text().strip()
        raise ConfigError(
            f"workdir={path} holds no checkpoint, though step {step} was saved there; put "
            f"{path / CHECKPOINTS} back or name a new workdir"
        )


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


@contextlib.contextmanager
def reported(path: Path) -> Iterator[None]:
    """Turns a full or closed disk into one line.

    Raises:
        ConfigError: something could not be written for want of room or permission.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise ConfigError(
            f"workdir={path} cannot be written: {error.strerror}; earlier checkpoints are untouched"
        ) from error


def read_config(workdir: str | Path) -> Config:
    """The config that made a workdir.

    Raises:
        ConfigError: no such workdir, or its config cannot be read.
    """
    return configs.from_json(_described(Path(workdir), "config", dict))


def read_spec(workdir: str | Path) -> DataSpec:
    """The shape and meaning of the data that a workdir's model was trained on; needs no data.

    Raises:
        ConfigError: no such workdir, or its description cannot be read.
    """
    described = _described(Path(workdir), "data_spec", dict)
    values: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in described.items()}
    try:
        return DataSpec(**values)
    except TypeError as error:
        raise ConfigError(f"{Path(workdir) / CONFIG_FILE}: data_spec: {error}") from None


def check_data(path: Path, spec: DataSpec, examples: int) -> None:
    """Compares the data of a run with those that a workdir was made with; a new one passes.

    The same name may stand for other data: another release of a data set, or one rebuilt.

    Args:
        path: the workdir.
        spec: of the data at hand.
        examples: number of training examples at hand.

    Raises:
        ConfigError: the description or the number differs.
    """
    if not (path / CONFIG_FILE).exists():
        return
    old = {f"data_spec.{k}": v for k, v in dataclasses.asdict(read_spec(path)).items()}
    new = {f"data_spec.{k}": v for k, v in dataclasses.asdict(spec).items()}
    old["train_examples"], new["train_examples"] = _described(path, "train_examples", int), examples
    changed = [f"{key}: {old[key]!r} -> {new[key]!r}" for key in old if old[key] != new[key]]
    if changed:
        raise ConfigError(
            f"workdir={path} was made with other data ({', '.join(changed)}); take those back or "
            "name a new workdir"
        )


def _described(path: Path, entry: str, kind: type) -> Any:
    """An entry of `config.json`."""
    check_local("workdir", path)
    file = path / CONFIG_FILE
    try:
        values = json.loads(file.read_text())[entry]
        if not isinstance(values, kind):
            raise TypeError(f"{entry} is no {'object' if kind is dict else 'whole number'}")
    except FileNotFoundError:
        if path.is_dir():
            raise ConfigError(f"workdir={path} is no workdir: it has no {CONFIG_FILE}") from None
        raise ConfigError(f"workdir={path} does not exist") from None
    except OSError as error:
        raise ConfigError(f"workdir={path} cannot be read: {error.strerror}") from None
    except KeyError:
        raise ConfigError(f"{file} has no entry {entry!r}; expected it as it was written") from None
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{file} cannot be read: {error}; expected it as it was written"
        ) from None
    return values


def write_config(path: Path, config: Config, spec: DataSpec, examples: int) -> None:
    """Writes `config.json`: config, shape and number of the training data, versions, commit."""
    described = {
        "config": configs.to_json(config),
        "data_spec": dataclasses.asdict(spec),
        "train_examples": examples,
        "versions": versions(),
        "git_commit": git_commit(),
    }
    temporary = path / f".{CONFIG_FILE}.tmp"
    temporary.write_text(json.dumps(described, indent=2) + "\n")
    temporary.replace(path / CONFIG_FILE)


def versions() -> dict[str, str]:
    """Versions of the packages that decide what a run computes."""
    found: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Commit of the source tree, with `-dirty` where it was changed; None outside a clone."""
    here = Path(__file__).resolve().parents[1]

    def git(*args: str) -> str:
        command = ["git", "-C", str(here), *args]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != here:
            return None
        commit = git("rev-parse", "HEAD")
        return f"{commit}-dirty" if git("status", "--porcelain", "-uno") else commit
    except (OSError, subprocess.SubprocessError):
        return None
