"""Defaults, JSON round trip, and which fields may change when a run resumes.

A config is a locked `ConfigDict`: a key that does not exist is an error. A component is chosen by
name, and every known component keeps its options in a branch of its own, so that one flag switches
it: `--config.network.name=dit` reads `network.dit` and ignores `network.unet`.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from diffusion_jax import defaults
from diffusion_jax.errors import ConfigError, nearest, unknown_name

Config = Any
"""An `ml_collections.ConfigDict`. Its fields exist at run time alone, so no checker knows them."""

MAY_CHANGE = (
    "steps",
    "batch_size",
    "accumulation",
    "deterministic",
    "compilation_cache",
    "data.data_dir",
    "data.path",
    "data.prefetch",
    "data.*.held_out",
    "data.*.memory",
    "data.*.workers",
    "data.*.max_unreadable",
    "mesh.*",
    "logging.*",
    "checkpoint.*",
    "validation.*",
    "sampling.*",
    "evaluation.*",
    "guard.*",
    # Of the first start alone, and where an encoder lies: another one is known by its hash.
    "init_from",
    "objective.denoising.alignment.workdir.path",
)
"""Fields that a resumed run may change; a difference in any other is an error. The batch size may
change because the position in the data is kept in examples."""


def base() -> Config:
    """Every field with its default. Config files start from this and set what they need."""
    config = ConfigDict(
        {
            "seed": 0,
            "steps": 1000,
            "batch_size": 128,
            "accumulation": 1,
            # "float32", "bfloat16", or "auto": bfloat16 on accelerators, float32 on CPU. A workdir
            # keeps which it was: a run never changes its precision on another machine.
            "compute_dtype": "auto",
            # Bit-reproducible kernels on GPU, at some cost; CPU and TPU always are.
            "deterministic": False,
            # Folder of compiled programs kept between starts; "" takes the user's cache folder.
            # JAX_COMPILATION_CACHE_DIR of the environment goes before it.
            "compilation_cache": "",
            "data": defaults.data(),
            "process": defaults.process(),
            "network": defaults.network(),
            "text": defaults.text(),
            "objective": defaults.objective(),
            "optimizer": defaults.optimizer(),
            # Parameters with a rate or decay of their own, by name: {"pattern": "regular expression
            # of paths", "rate": peak learning rate, "decay": weight decay}, in a config file or by
            # flags: --config.parameter_groups.last.pattern=head --config.parameter_groups.last.rate
            # =1e-4. Of several that fit a path the first in the alphabet counts.
            "parameter_groups": {},
            # More averages by name, in a config file or by flag: --config.ema.decays.long=0.9999.
            # `powers` are those of EDM2 by relative length (0.05 is a twentieth of the run), from
            # which other lengths can be made afterwards.
            "ema": {"decays": {"default": 0.999}, "warmup": True, "powers": {}},
            # Workdir of another run whose weights this one starts from, as far as they fit.
            "init_from": "",
            # Non-finite updates are skipped; more than `limit` in a row end the run with code 70.
            "guard": {"limit": 10},
            # Axis sizes; -1 takes the devices that are left.
            "mesh": {"data": -1, "fsdp": 1, "context": 1, "tensor": 1, "fsdp_min_size": 2**14},
            "checkpoint": {"every": 1000, "keep_last": 3, "keep_every": placeholder(int)},
            # Intervals in steps. A profile of `profile_steps` steps starts at step `profile_at`.
            "logging": {"every": 50, "profile_at": 0, "profile_steps": 5, "tensorboard": True},
            "validation": {"every": 500, "examples": 512, "batch_size": placeholder(int)},
            "sampling": defaults.sampling(),
            "evaluation": defaults.evaluation(),
        }
    )
    return config.lock()


def component(config: Config, field: str) -> tuple[str, dict[str, Any]]:
    """The chosen component of `config` and its options.

    Args:
        config: a section with `name` and one branch per component.
        field: the section's path, for the message.

    Raises:
        ConfigError: the name is none of the branches.
    """
    known = [key for key, value in config.items() if isinstance(value, ConfigDict)]
    if config.name not in known:
        raise ConfigError(unknown_name(f"config.{field}.name", config.name, known))
    return config.name, config[config.name].to_dict()


def flatten(config: Config | Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All fields as (dotted path, value), in a stable order; tuples become lists as in JSON."""
    for key in sorted(config):
        value = config[key]
        if isinstance(value, ConfigDict | Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted path -> (old, new) of all fields that differ; a missing field counts as None."""
    before, after = dict(flatten(old)), dict(flatten(new))
    paths = sorted({*before, *after})
    return {
        path: (before.get(path), after.get(path))
        for path in paths
        if before.get(path) != after.get(path)
    }


def may_change(path: str) -> bool:
    """Whether a resumed run may change the field at this dotted path."""
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in MAY_CHANGE)


def check_resume(old: Config, new: Config, workdir: str) -> None:
    """Compares the config of a workdir with the one asked for.

    Raises:
        ConfigError: a field differs that may not change; the difference is shown.
    """
    changed = {p: pair for p, pair in differences(old, new).items() if not may_change(p)}
    if old.get("compute_dtype") == "auto":
        # Written before the workdir kept which it was.
        changed.pop("compute_dtype", None)
    changed = {p: pair for p, pair in changed.items() if _is_read(p, old) or _is_read(p, new)}
    if changed:
        shown = ", ".join(f"config.{p}: {a!r} -> {b!r}" for p, (a, b) in changed.items())
        raise ConfigError(
            f"workdir={workdir} was made with another config ({shown}); "
            "take these values back or name a new workdir"
        )


def _is_read(path: str, config: Config) -> bool:
    """Whether the field lies in a branch that is in use: `network.dit.*` is not under a U-Net."""
    section = config
    for key in path.split(".")[:-1]:
        if not isinstance(section, ConfigDict) or key not in section:
            return False
        branch = section[key]
        chosen = section.get("name")
        # In a section of the user's own names "name" may be anything.
        named = isinstance(chosen, str) and chosen in section
        if named and isinstance(branch, ConfigDict) and key != chosen:
            return False
        section = branch
    return True


def to_json(config: Config) -> dict[str, Any]:
    """The config as plain JSON values."""
    return json.loads(json.dumps(config.to_dict()))


def from_json(values: Mapping[str, Any]) -> Config:
    """Reads `to_json` back. Fields that did not exist when it was written take their default.

    Raises:
        ConfigError: a field is unknown to this version.
    """
    config = base()
    _overlay(config, values, "config")
    return config


GROUPS = "config.parameter_groups"
GROUP_FIELDS = {"pattern": str, "rate": float, "decay": float}
OPEN_SECTIONS = ("config.ema.decays", "config.ema.powers", GROUPS)
"""Sections whose keys are names given by the user; their values are numbers, or groups."""


def _overlay(section: Config, values: Mapping[str, Any], path: str) -> None:
    for key, value in values.items():
        field = f"{path}.{key}"
        if key not in section:
            close = nearest(key, section.keys())
            hint = f"; did you mean {path}.{close}?" if close else ""
            raise ConfigError(f"{field}={value!r} is not a field of this version{hint}")
        if not isinstance(section[key], ConfigDict):
            _assign(section, key, tuple(value) if isinstance(value, list) else value, field)
        elif not isinstance(value, Mapping):
            raise ConfigError(f"{field}={value!r}: expected a section, with {_some(section[key])}")
        elif field in OPEN_SECTIONS:
            check = _check_group if field == GROUPS else _check_number
            for name, given in value.items():
                check(f"{field}.{name}", given)
            with section.unlocked():
                section[key] = ConfigDict(dict(value)).lock()
        else:
            _overlay(section[key], value, field)


def _check_number(field: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{field}={value!r}: expected a number")


def _check_group(field: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"{field}={value!r}: expected a section, such as {{'pattern': 'head', 'rate': 1e-4}}"
        )
    for name, given in value.items():
        if name not in GROUP_FIELDS:
            raise ConfigError(unknown_name(f"{field} field", name, GROUP_FIELDS))
        if given is None:
            continue
        if GROUP_FIELDS[name] is float:
            _check_number(f"{field}.{name}", given)
        elif not isinstance(given, str):
            raise ConfigError(f"{field}.{name}={given!r}: expected a text, such as 'head'")


def _some(section: Config) -> str:
    return f"fields such as {min(section)}" if len(section) else "no fields"


def _assign(section: Config, key: str, value: Any, field: str) -> None:
    kind = section.get_type(key)
    # ml_collections takes None for anything; only a field that begins as None may be it.
    fits = value is not None or section[key] is None
    with contextlib.suppress(TypeError):
        if fits and not isinstance(value, Mapping):
            section[key] = value
            return
    example = "" if section[key] is None else f", such as {section[key]!r}"
    raise ConfigError(f"{field}={value!r}: expected {kind.__name__}{example}")


def apply_variant(
    config: Config, variant: str | None, known: Mapping[str, Callable[[ConfigDict], None]]
) -> None:
    """Applies the variant named after the colon in `--config=file.py:variant`.

    Raises:
        ConfigError: the config has no such variant.
    """
    if not variant:
        return
    if variant not in known:
        raise ConfigError(unknown_name("config variant", variant, known))
    known[variant](config)
