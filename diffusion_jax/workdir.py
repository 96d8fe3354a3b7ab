"""A workdir describes itself: which config made it, with which versions, and where things lie."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fnmatch
import importlib.metadata
import json
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
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
DRY_RUN = "dry_run"
METRICS = "metrics.jsonl"
PACKAGES = ("diffusion-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def prepare(workdir: str | Path, config: Config) -> Path:
    """Makes or opens a workdir for a run with this config.

    Args:
        workdir: folder; created when missing.
        config: the config asked for.

    Raises:
        ConfigError: the folder cannot be written, holds something else, has lost its checkpoints,
            or was made with a config that differs in a field that may not change.
    """
    if not str(workdir):
        raise ConfigError("--workdir is missing; name a folder, such as --workdir=runs/digits")
    path = folder_of(workdir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        # Hidden, since some file systems show even a file without a name.
        with tempfile.TemporaryFile(dir=path, prefix="."):
            pass
        names = [entry.name for entry in path.iterdir()]
        steps = _has_steps(path / CHECKPOINTS)
    except OSError as error:
        raise ConfigError(f"workdir={path} cannot be written: {error.strerror}") from None
    if CONFIG_FILE in names:
        configs.check_resume(read_config(path), config, str(path))
        # A run makes the folder before it writes its config.
        if CHECKPOINTS not in names:
            raise ConfigError(
                f"workdir={path} holds the {CONFIG_FILE} of a run but no {CHECKPOINTS}; put "
                f"{path / CHECKPOINTS} back or name a new workdir"
            )
    elif steps:
        raise ConfigError(
            f"workdir={path} holds checkpoints but no {CONFIG_FILE}; put the file back or name a "
            "new workdir"
        )
    elif strange := [name for name in sorted(names) if not _may_precede(path / name)]:
        raise ConfigError(
            f"workdir={path} holds {', '.join(strange[:5])} but no {CONFIG_FILE}: it is not of a "
            "run; name a new or empty folder"
        )
    return path


def folder_of(workdir: str | Path) -> Path:
    """The folder that is meant, `~` resolved.

    Raises:
        ConfigError: it lies in an object store, or with a user who does not exist.
    """
    check_local("workdir", workdir)
    try:
        return Path(workdir).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"workdir={workdir}: {error}; name a folder in full") from None


BEFORE = (".*", "*.log", "*.out", "*.err", "lost+found", CHECKPOINTS, "events.*", DRY_RUN)
"""What a launcher puts into a folder before a run, and what one that was killed early or only
tried left there."""


def _may_precede(path: Path) -> bool:
    if path.name == METRICS:
        return path.stat().st_size == 0
    return any(fnmatch.fnmatchcase(path.name, pattern) for pattern in BEFORE)


def _has_steps(folder: Path) -> bool:
    return folder.is_dir() and any(entry.name.isdigit() for entry in folder.iterdir())


def note_saved(path: Path, step: int) -> None:
    """Remembers outside the checkpoints that there was one, so that their loss is noticed."""
    temporary = path / f"{SAVED_FILE}.tmp"
    temporary.write_text(f"{step}\n")
    temporary.replace(path / SAVED_FILE)


def check_never_saved(path: Path) -> None:
    """For a workdir without checkpoints: training may start at step 0 only if there never was one.

    Raises:
        ConfigError: a checkpoint was saved here and is gone.
    """
    if not (path / SAVED_FILE).exists():
        return
    try:
        step = f"step {(path / SAVED_FILE).read_text().strip()}"
    except (OSError, ValueError):
        step = "one"
    raise ConfigError(
        f"workdir={path} holds no checkpoint, though {step} was saved there; put "
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


def check_data(path: Path, spec: DataSpec, examples: int, fingerprint: str) -> None:
    """Compares the data of a run with those that a workdir was made with; a new one passes.

    The same name may stand for other data: another release of a data set, or one rebuilt.

    Args:
        path: the workdir.
        spec: of the data at hand.
        examples: number of training examples at hand.
        fingerprint: of their ids, in order.

    Raises:
        ConfigError: the description, the number or the examples differ.
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
    # Workdirs of earlier versions have none.
    if _described(path, "train_ids", str, fingerprint) != fingerprint:
        raise ConfigError(
            f"workdir={path} was made with other training examples, as many as these: files were "
            "renamed, replaced or split otherwise; take those back or name a new workdir"
        )


def check_frozen(path: Path, hashes: Mapping[str, str]) -> None:
    """Compares the frozen parts of a run with those that a workdir was made with.

    Args:
        path: the workdir; a new one passes.
        hashes: of the parameters at hand, by name.

    Raises:
        ConfigError: a part is another one.
    """
    if not (path / CONFIG_FILE).exists():
        return
    try:
        old = json.loads((path / CONFIG_FILE).read_text()).get("frozen", {})
    except (OSError, ValueError):
        old = _described(path, "frozen", dict)
    changed = [
        f"{name}: parameters {old.get(name)} -> {hashes.get(name)}"
        for name in sorted({*old, *hashes})
        if old.get(name) != hashes.get(name)
    ]
    if changed:
        raise ConfigError(
            f"workdir={path} was made with another frozen encoder ({', '.join(changed)}); take "
            "that one back or name a new workdir"
        )


def _described(path: Path, entry: str, kind: type, default: Any = None) -> Any:
    """An entry of `config.json`; `default`, if given, where it has none."""
    path = folder_of(path)
    file = path / CONFIG_FILE
    try:
        described = json.loads(file.read_text())
        values = described[entry] if default is None else described.get(entry, default)
        if not isinstance(values, kind):
            expected = {dict: "object", int: "whole number", str: "text"}
            raise TypeError(f"{entry} is no {expected[kind]}")
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


def write_config(
    path: Path,
    config: Config,
    spec: DataSpec,
    examples: int,
    fingerprint: str,
    frozen: Mapping[str, str] | None = None,
) -> None:
    """Writes `config.json`: config, shape, number and ids of the training data, hashes of what is
    frozen, versions, commit."""
    described = {
        "config": configs.to_json(config),
        "data_spec": dataclasses.asdict(spec),
        "train_examples": examples,
        "train_ids": fingerprint,
        "frozen": dict(frozen or {}),
        "versions": versions(),
        "git_commit": git_commit(),
    }
    temporary = path / f".{CONFIG_FILE}.tmp"
    temporary.write_text(json.dumps(described, indent=2) + "\n")
    temporary.replace(path / CONFIG_FILE)


def show(path: Path, what: str) -> None:
    """Prints what came of a run, where it lies and what can be done with it."""
    places = {
        "samples": path / SAMPLES,
        "trajectory": path / TRAJECTORY,
        "checkpoints": path / CHECKPOINTS,
        "metrics": path / METRICS,
    }
    found = (f"  {name:<12} {place}" for name, place in places.items() if place.exists())
    print(
        f"{what}.",
        *found,
        "Next:",
        f"  python -m diffusion_jax.sample --workdir={path} --num=64 --out={path}/more",
        f"  tensorboard --logdir={path}",
        sep="\n",
        flush=True,
    )


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
