"""One line for what absl and ml_collections report in many shapes."""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict

from diffusion_jax import config as configs
from diffusion_jax.errors import DiffusionJaxError, nearest

KINDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}


def explain(error: BaseException, argv: Sequence[str]) -> str:
    """What is wrong with the command line `argv`, whose parsing raised `error`."""
    if isinstance(error, flags.UnrecognizedFlagError):
        close = nearest(error.flagname, list(flags.FLAGS))
        hint = f"; did you mean --{close}?" if close else ""
        return f"--{error.flagname} is no flag{hint}"
    for argument in argv:
        path = argument.removeprefix("--").removeprefix("config=").partition(":")[0]
        if argument.startswith("--config=") and (in_file := _in_config_file(error, path)):
            return in_file
    text = _one_line(error)
    for argument in argv:
        field, given, value = argument.removeprefix("--").partition("=")
        if not field.startswith("config."):
            continue
        if unknown := _unknown_field(field, value):
            return unknown
        if given and f"--{argument.lstrip('-')}:" in f"--{text.removeprefix('flag --')}:":
            return _wrong_type(field, value)
    return text or type(error).__name__


def _unknown_field(field: str, value: str) -> str | None:
    """A line when no section of the config has `field`, given as `config.a.b`."""
    section, path = configs.base(), "config"
    for key in field.split(".")[1:]:
        if not isinstance(section, ConfigDict):
            return f"{field}={value!r}: {path} is a value and has no fields"
        if key not in section:
            close = nearest(key, section.keys())
            hint = f"did you mean {path}.{close}?" if close else f"known: {', '.join(section)}"
            return f"{field}={value!r}: {path} has no field {key!r}; {hint}"
        section, path = section[key], f"{path}.{key}"
    return None


def _wrong_type(field: str, value: str) -> str:
    *parents, key = field.split(".")[1:]
    section = configs.base()
    for parent in parents:
        section = section[parent]
    if isinstance(section[key], ConfigDict):
        return f"{field}={value!r}: expected one of its fields, such as {field}.{min(section[key])}"
    kind = KINDS.get(section.get_type(key), section.get_type(key).__name__)
    example = f", such as {section[key]!r}" if section[key] not in (None, "") else ""
    return f"{field}={value!r}: expected {kind}{example}"


def _in_config_file(error: BaseException | None, path: str) -> str | None:
    """A line when the config file is missing, or `error` or what caused it arose there."""
    if not os.path.isfile(path):
        return f"--config={path!r} is no file; expected one such as configs/digits.py"
    while error is not None:
        # ml_collections raises its trace anew as the same type; the error itself is its context.
        if isinstance(error, DiffusionJaxError) and "Traceback" not in str(error):
            return str(error)
        for frame in reversed(traceback.extract_tb(error.__traceback__)):
            if frame.filename == path:
                return f"{path}, line {frame.lineno}: {type(error).__name__}: {_one_line(error)}"
        if isinstance(error, SyntaxError):
            return f"{path}, line {error.lineno}: {_one_line(error)}"
        if "has no attribute 'get_config'" in str(error):
            return f"--config={path!r} has no function get_config"
        error = error.__cause__ or error.__context__
    return None


def _one_line(error: BaseException) -> str:
    text = str(error).replace("\\n", " ").replace("\\'", "'")
    text = re.sub(r'Other fields present: "\{.*\}"', "", text)
    return re.sub(r"\s+", " ", text).strip().strip("'\"")
