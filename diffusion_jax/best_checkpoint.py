"""Which checkpoint of a run scored best: `best.json` of its workdir."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion_jax import workdir
from diffusion_jax.checkpoints import Checkpointer
from diffusion_jax.errors import ConfigError
from diffusion_jax.pipelines.options import whole
from diffusion_jax.visual.pixels import replace_file

FILE = "best.json"
FIELDS = ("step", "score", "value", "standard_error", "n", "ema")
NAMES = ("best", "newest")


def write(folder: Path, row: Mapping[str, Any]) -> None:
    """Notes the row of the best score (`evaluation.report`), whole or not at all."""

    def put(path: Path) -> None:
        path.write_text(json.dumps({name: row[name] for name in FIELDS}, indent=1) + "\n")

    replace_file(folder / FILE, put)


def read(folder: Path) -> dict[str, Any] | None:
    """What `write` noted; None where it noted nothing.

    Raises:
        ConfigError: the file is not one of ours.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{str(path)!r} is no JSON ({error}); remove it") from error
    if not isinstance(found, dict) or set(found) != set(FIELDS):
        raise ConfigError(f"{str(path)!r}: expected {', '.join(FIELDS)}; remove it")
    return found


def asked_step(path: str | Path, asked: int | str | None) -> int | None:
    """The step of the checkpoint that is asked for; None for the newest.

    Args:
        path: the workdir.
        asked: a step that was kept, "best", "newest" or None.

    Raises:
        ConfigError: no such checkpoint.
    """
    if asked is None or asked == "newest":
        return None
    folder = workdir.folder_of(path)
    with Checkpointer(folder / workdir.CHECKPOINTS, read_only=True) as checkpoints:
        steps = checkpoints.steps()
    if asked == "best":
        found = read(folder)
        if found is None:
            raise ConfigError(
                f"checkpoint='best': {str(folder)!r} noted none; train with config.evaluation.best"
            )
        step = found["step"]
    elif isinstance(asked, str) and not asked.isdecimal():
        raise ConfigError(f"checkpoint={asked!r}: expected a step, {' or '.join(NAMES)}")
    else:
        step = whole("checkpoint", int(asked) if isinstance(asked, str) else asked, low=0)
    if step not in steps:
        kept = ", ".join(map(str, steps)) or "none"
        raise ConfigError(f"checkpoint={asked!r}: step {step} was not kept; there are {kept}")
    return step
