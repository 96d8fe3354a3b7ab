"""What bounds and densities refuse of their arguments, one line each."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Array

from diffusion_jax.diffusion.solvers import stepping
from diffusion_jax.errors import ConfigError


def given_keys(name: str, key: Array | None, batch: int) -> Array:
    """[batch] keys of the examples, as for the solvers; ConfigError where `name` is given none."""
    if key is None:
        raise ConfigError(f"key=None; {name} draws noise: give key")
    return stepping.example_keys(key, batch)


def check_count(name: str, value: Any) -> None:
    """ConfigError unless `value` is a whole number, at least 1."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise ConfigError(f"{name}={value!r}; expected a whole number, at least 1")
    if value < 1:
        raise ConfigError(f"{name}={value}; expected at least 1")


def check_positive(name: str, value: Any) -> None:
    """ConfigError unless `value` is a number above 0."""
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not number or not value > 0.0:
        raise ConfigError(f"{name}={value!r}; expected a positive number")
