"""The flag --config=FILE:VARIANT, and with it one flag for every field of the config.

ml_collections makes the flags of the fields. The file itself is loaded here, so that whatever is
wrong with it ends in one line, and so that a flag can add a key to the sections whose keys are
names given by the user: --config.ema.decays.long=0.9999.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_dict import placeholder

from diffusion_jax.config import GROUP_FIELDS, GROUPS, OPEN_SECTIONS, Config, base
from diffusion_jax.errors import ConfigError, DiffusionJaxError

NAME = "config"
# The flags belong to the door that asks for them, in --help too.
flags.disclaim_key_flags()


def define(text: str) -> flags.FlagHolder:
    """The flag --config; `text` is its help."""
    holder = config_flags.DEFINE_config_file(NAME, None, text, flag_values=flags.FLAGS)
    flags.FLAGS[NAME].parser = ConfigFile()
    return holder


def loaded() -> Config:
    """The config that the command line names, as its file made it; the defaults without one."""
    return ConfigFile.config or base()


def given(argv: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """(flag, value) of every argument, `--flag=value` and `--flag value` alike."""
    for argument, following in zip(argv, [*argv[1:], "--"], strict=True):
        if match := re.match(r"--?([^-=][^=]*)(=?)(.*)", argument, re.DOTALL):
            name, equals, value = match.groups()
            spaced = None if following.startswith("--") else following
            yield name, value if equals else spaced


class ConfigFile(flags.ArgumentParser):
    """Parses FILE or FILE:VARIANT into what the file's `get_config` returns."""

    config: Config | None = None

    def parse(self, argument: str) -> Config:
        """The locked config.

        Raises:
            ConfigError: there is no such file, it fails, or it returns something else.
        """
        path, colon, variant = argument.partition(":")
        if not Path(path).is_file():
            raise ConfigError(
                f"--config={path!r} is no file; expected one such as configs/digits.py"
            )
        try:
            config = _module(path).get_config(*[variant] if colon else [])
        except DiffusionJaxError:
            raise
        except Exception as error:  # a config file may raise anything
            raise ConfigError(_in_file(error, path, argument)) from error
        if not isinstance(config, ConfigDict):
            raise ConfigError(
                f"{path}: get_config returned {config!r}; expected a config made from "
                "diffusion_jax.config.base()"
            )
        _open(config)
        ConfigFile.config = config.lock()
        return config


def _module(path: str) -> Any:
    spec = importlib.util.spec_from_file_location("config_file", path)
    if spec is None or spec.loader is None:
        raise ConfigError(
            f"--config={path!r}: expected a file of Python, such as configs/digits.py"
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules["config_file"] = module
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"--config={path!r} has no function get_config")
    return module


def _in_file(error: Exception, path: str, argument: str) -> str:
    """Where in the file an error arose; calling `get_config` itself may fail too."""
    kind, text = type(error).__name__, one_line(error)
    if isinstance(error, SyntaxError) and error.filename == os.path.abspath(path):
        return f"{path}, line {error.lineno}: {error.msg}"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename == os.path.abspath(path):
            return f"{path}, line {frame.lineno}: {kind}: {text}"
    return (
        f"--config={argument!r}: {text}; expected get_config(variant=''), which also takes the "
        "name after a colon, as in --config=FILE:VARIANT"
    )


def one_line(error: BaseException) -> str:
    """The text of an error without its line breaks and ml_collections' lists of fields."""
    text = str(error).replace("\\n", " ").replace("\\'", "'")
    text = re.sub(r'Other fields present: "\{.*\}"', "", text)
    text = re.sub(r"\s+", " ", text).strip()
    # A KeyError is in quotes.
    return re.sub(r"""^(["'])(.*)\1$""", r"\2", text)


def _open(config: Config) -> None:
    """Makes room for the names that the command line adds to the open sections."""
    arguments = flags.FLAGS.read_flags_from_files(sys.argv, force_gnu=False)
    for flag, _ in given(arguments):
        section_name, _, name = flag.rpartition(".")
        group = section_name.rpartition(".")[0] == GROUPS and name in GROUP_FIELDS
        if group:
            section_name, _, name = section_name.rpartition(".")
        if section_name not in OPEN_SECTIONS or not name.isidentifier():
            continue
        section = config
        for key in section_name.split(".")[1:]:
            section = section.get(key) if isinstance(section, ConfigDict) else None
        if not isinstance(section, ConfigDict):
            continue
        with section.unlocked():
            if group:
                # A group of the config file may lack some of its fields.
                if name not in section:
                    section[name] = ConfigDict()
                fields = section[name]
                if isinstance(fields, ConfigDict):
                    for key in set(GROUP_FIELDS) - set(fields):
                        fields[key] = placeholder(GROUP_FIELDS[key])
            elif name not in section and section_name != GROUPS:
                section[name] = placeholder(float)
