"""Sources by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, get_args

from diffusion_jax.data.digits import digits
from diffusion_jax.data.heartbeat import heartbeat
from diffusion_jax.data.image_folder import image_folder
from diffusion_jax.data.latents import latents
from diffusion_jax.data.markov import markov
from diffusion_jax.data.parquet import parquet
from diffusion_jax.data.points import points
from diffusion_jax.data.spec import Source, Split
from diffusion_jax.data.text_file import text
from diffusion_jax.data.tfds import tfds
from diffusion_jax.data.webdataset import webdataset
from diffusion_jax.errors import ConfigError, unknown_name

SOURCES: dict[str, Callable[..., Source]] = {
    "digits": digits,
    "points": points,
    "heartbeat": heartbeat,
    "latents": latents,
    "markov": markov,
    "text": text,
    "tfds": tfds,
    "image_folder": image_folder,
    "webdataset": webdataset,
    "parquet": parquet,
}
"""Name -> function of (split, **options)."""


def load(name: str, split: str, /, **options: Any) -> Source:
    """Build a source.

    Args:
      name: one of `SOURCES`.
      split: "train" or "validation"; no example is in both.
      **options: of that source; see its function.

    Raises:
      ConfigError: unknown name, split or option, or an option out of range.
      DataError: the data are missing or unreadable.
    """
    if name not in SOURCES:
        raise ConfigError(unknown_name("data.name", name, SOURCES))
    if split not in get_args(Split):
        raise ConfigError(unknown_name("split", split, get_args(Split)))
    known = list(inspect.signature(SOURCES[name]).parameters)[1:]
    for option in options:
        if option not in known:
            raise ConfigError(unknown_name(f"data.{name} option", option, known))
    return SOURCES[name](split, **options)
