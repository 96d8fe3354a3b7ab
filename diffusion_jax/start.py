"""How a run starts: its workdir opened, once, and alike in all its processes."""

from __future__ import annotations

import dataclasses
import fnmatch
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
from etils import epath

from diffusion_jax import config as configs
from diffusion_jax import lock, workdir
from diffusion_jax.checkpoints.layout import complete_steps
from diffusion_jax.config import Config
from diffusion_jax.data.identity import fingerprint
from diffusion_jax.data.spec import Source
from diffusion_jax.errors import ConfigError, DataError, named
from diffusion_jax.parallel.cache import enable_compilation_cache
from diffusion_jax.parallel.distributed import gather_json

CACHE_VARIABLE = "JAX_COMPILATION_CACHE_DIR"
OF_A_PROCESS = (
    "compilation_cache",
    "data.data_dir",
    "data.path",
    "data.prefetch",
    "data.*.memory",
    "data.*.workers",
    "logging.*",
)
"""Fields that may differ between the processes of a run."""
VISIBLE_AFTER = (0.0, 0.1, 0.4, 1.0, 1.5, 2.0)
"""Seconds between looks at a folder: network file systems show what others wrote a moment late."""


def open_workdir(path: str | Path, config: Config) -> tuple[Path, lock.Lock | None]:
    """Makes or opens the workdir and, in process 0, holds it. Every process must call it.

    Raises:
        ConfigError: the workdir cannot be used, in one process or in all; another run holds it; or
            the processes were given configs or workdirs that differ.
    """
    folder, held, error = Path(), None, None
    try:
        folder = workdir.prepare(path, config)
        if jax.process_index() == 0:
            held = lock.take(folder)
        newest(folder)
    except ConfigError as mistake:
        error = mistake
    with lock.release_on_error(held):
        if jax.process_count() > 1:
            _agree(folder, config, held, error)
        if error is not None:
            raise error
    return folder, held


def newest(folder: Path) -> int | None:
    """The newest checkpoint of a workdir; None where there is none."""
    return max(complete_steps(epath.Path(folder) / workdir.CHECKPOINTS), default=None)


def as_begun(folder: Path, config: Config) -> Config:
    """The config with the `init_from` that a run began with: it is of the first start alone."""
    if newest(folder) is None:
        return config
    begun = workdir.read_config(folder).init_from
    if begun == config.init_from:
        return config
    if jax.process_index() == 0:
        how = f"from {begun}" if begun else "from fresh parameters"
        print(f"config.init_from={config.init_from!r} is left: {folder} began {how}", flush=True)
    result = configs.from_json(configs.to_json(config))
    result.init_from = begun
    return result


@dataclasses.dataclass(frozen=True)
class _View:
    """What one process sees. Processes that see another step or token would train apart."""

    error: str | None
    config: dict[str, Any]
    workdir: str
    step: int | None
    token: str

    def place(self) -> str:
        step = "no checkpoint" if self.step is None else f"step {self.step}"
        return f"{self.workdir} with {step}"


def _agree(folder: Path, config: Config, held: lock.Lock | None, error: ConfigError | None) -> None:
    """Returns in every process, or in none.

    Raises:
        ConfigError: the processes see different things, or one has an error.
    """
    fields = {
        path: value
        for path, value in configs.flatten(config)
        if not any(fnmatch.fnmatchcase(path, pattern) for pattern in OF_A_PROCESS)
    }
    views: list[_View] = []
    for seconds in VISIBLE_AFTER:
        time.sleep(seconds)
        step = None if error else newest(folder)
        token = held.token if held else lock.token_in(folder)
        mine = _View(error and str(error), fields, str(folder), step, token)
        views = [_View(**view) for view in gather_json(dataclasses.asdict(mine))]
        _check_alike(views, error)
        if all((view.step, view.token) == (views[0].step, views[0].token) for view in views):
            return
    other = next(
        number
        for number, view in enumerate(views)
        if (view.step, view.token) != (views[0].step, views[0].token)
    )
    raise ConfigError(
        f"workdir is not the same folder in all processes: {views[0].place()} in process 0, "
        f"{views[other].place()} in process {other}; name one on a file system that all share"
    )


def _check_alike(views: list[_View], error: ConfigError | None) -> None:
    """The errors that no waiting mends."""
    if error is not None:
        raise error
    for number, view in enumerate(views):
        if view.error:
            raise ConfigError(f"process {number} of the run: {view.error}")
    first = views[0].config
    for number, view in enumerate(views):
        changed = [
            path for path in {**first, **view.config} if first.get(path) != view.config.get(path)
        ]
        if changed:
            shown = ", ".join(
                f"config.{path}: {first.get(path)!r} in process 0, {view.config.get(path)!r} in "
                f"process {number}"
                for path in sorted(changed)
            )
            raise ConfigError(f"{shown}; start every process with the same config and flags")


def agree_on_data(source: Source) -> str:
    """A hash of the training examples, which is the same in all processes. All must call it.

    Raises:
        DataError: another process has other examples.
    """
    mine = fingerprint(source)
    found = gather_json([mine, len(source)])
    for number, (hashed, count) in enumerate(found):
        if hashed != found[0][0]:
            raise DataError(
                f"config.data: the {count} training examples of process {number} are not the "
                f"{found[0][1]} of process 0; give every process the same files"
            )
    return mine


def enable_cache(config: Config) -> None:
    """Keeps compiled programs in the folder of the environment, of the config, or the user's own.

    The environment comes first, since a workdir may be sampled from on another machine. A home
    that cannot be written costs only the cache.
    """
    if folder := os.environ.get(CACHE_VARIABLE):
        with named(f"{CACHE_VARIABLE}: "):
            enable_compilation_cache(os.path.expanduser(folder))
    elif config.compilation_cache:
        with named("config."):
            enable_compilation_cache(os.path.expanduser(config.compilation_cache))
    else:
        try:
            enable_compilation_cache(default_cache())
        except ConfigError as error:
            if jax.process_index() == 0:
                message = f"every start compiles anew: {error}; or name one in {CACHE_VARIABLE}"
                print(f"Warning: {message}", file=sys.stderr, flush=True)


def default_cache() -> Path:
    """The user's own cache folder; a variable that is set but empty counts as not set."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(home)) / "diffusion_jax" / "xla"
