"""A workdir describes itself: which config made it, with which versions, and where things lie."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import tempfile
from pathlib import Path

from diffusion_jax import config as configs
from diffusion_jax.config import Config
from diffusion_jax.errors import ConfigError

CONFIG_FILE = "config.json"
CHECKPOINTS = "checkpoints"
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
    path = Path(workdir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ConfigError(f"workdir={path} cannot be written: {error.strerror}") from None
    if (path / CONFIG_FILE).exists():
        configs.check_resume(read_config(path), config, str(path))
    elif (path / CHECKPOINTS).exists() and any((path / CHECKPOINTS).iterdir()):
        raise ConfigError(
            f"workdir={path} holds checkpoints but no {CONFIG_FILE}; put the file back or name a "
            "new workdir"
        )
    return path


def read_config(workdir: str | Path) -> Config:
    """The config that made a workdir.

    Raises:
        ConfigError: no such workdir, or its config cannot be read.
    """
    path = Path(workdir)
    if not path.is_dir():
        raise ConfigError(f"workdir={path} does not exist")
    file = path / CONFIG_FILE
    if not os.access(path, os.R_OK | os.X_OK) or (file.exists() and not os.access(file, os.R_OK)):
        raise ConfigError(f"workdir={path} cannot be read: permission denied")
    if not file.exists():
        raise ConfigError(f"workdir={path} is no workdir: it has no {CONFIG_FILE}")
    try:
        values = json.loads(file.read_text())["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from None
    return configs.from_json(values)


def write_config(path: Path, config: Config) -> None:
    """Writes `config.json`: the config, the versions and the commit that run it."""
    described = {
        "config": configs.to_json(config),
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
