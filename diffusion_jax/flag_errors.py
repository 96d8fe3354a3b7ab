"""One line for what absl and ml_collections report in many shapes."""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict

from diffusion_jax.config import GROUPS, OPEN_SECTIONS
from diffusion_jax.config_flag import given, loaded, one_line
from diffusion_jax.errors import DiffusionJaxError, nearest

KINDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}


def explain(error: BaseException, argv: Sequence[str]) -> str:
    """What is wrong with the command line `argv`, whose parsing raised `error`."""
    if isinstance(error, flags.UnrecognizedFlagError):
        close = nearest(error.flagname, list(flags.FLAGS))
        hint = f"; did you mean --{close}?" if close else ""
        return f"--{error.flagname} is no flag{hint}"
    cause: BaseException | None = error
    while cause is not None:
        # absl raises anew what the parser of the config file says.
        if isinstance(cause, DiffusionJaxError):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    text = one_line(error)
    for field, value in given(argv):
        if not field.startswith("config."):
            continue
        if unknown := _unknown_field(field, value):
            return unknown
        if value is not None and f"--{field}={one_line(ValueError(value))}:" in text:
            return _wrong_type(field, value)
    return text or type(error).__name__


def _unknown_field(field: str, value: str | None) -> str | None:
    """A line when no section of the config has `field`, given as `config.a.b`."""
    section, path = loaded(), "config"
    for key in field.split(".")[1:]:
        if not isinstance(section, ConfigDict):
            return f"{field}={value!r}: {path} is a value and has no fields"
        if key not in section:
            close = nearest(key, section.keys())
            hint = f"did you mean {path}.{close}?" if close else f"known: {', '.join(section)}"
            if path == GROUPS:
                hint = f"a new one has a pattern, and a rate or decay: {path}.NAME.pattern=head"
            elif path in OPEN_SECTIONS:
                hint = "a new one is a name of letters, digits and _"
            return f"{field}={value!r}: {path} has no field {key!r}; {hint}"
        section, path = section[key], f"{path}.{key}"
    return None


def _wrong_type(field: str, value: str) -> str:
    *parents, key = field.split(".")[1:]
    section = loaded()
    for parent in parents:
        section = section[parent]
    if isinstance(section[key], ConfigDict):
        # An empty section is one of those whose fields the user names.
        inner = min(section[key], default="NAME")
        return f"{field}={value!r}: expected one of its fields, such as {field}.{inner}"
    kind = KINDS.get(section.get_type(key), section.get_type(key).__name__)
    example = f", such as {section[key]!r}" if section[key] not in (None, "") else ""
    return f"{field}={value!r}: expected {kind}{example}"
