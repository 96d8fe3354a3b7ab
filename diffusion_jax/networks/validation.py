"""Checks of sizes, made before anything is compiled; messages name the config field."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from diffusion_jax.errors import ConfigError, unknown_name
from diffusion_jax.networks.embeddings import NOISE_SCALES


def check_positive(section: str, **fields: int) -> None:
    """Raises ConfigError for the first of the section's sizes that is below one."""
    for field, value in fields.items():
        if value < 1:
            raise ConfigError(f"{section}.{field}={value}: expected at least 1")


def check_not_negative(section: str, **fields: int) -> None:
    """Raises ConfigError for the first of the section's counts that is below zero."""
    for field, value in fields.items():
        if value < 0:
            raise ConfigError(f"{section}.{field}={value}: expected 0 (none) or more")


def check_share(section: str, **fields: float) -> None:
    """Raises ConfigError for the first of the section's shares that is not from 0 to 1."""
    for field, value in fields.items():
        if not 0 <= value <= 1:
            raise ConfigError(f"{section}.{field}={value}: expected a share from 0 to 1")


def check_spatial(section: str, shape: Sequence[int]) -> None:
    """Raises ConfigError unless examples are 1 to 3 spatial axes and channels, all positive."""
    if not 2 <= len(shape) <= 4 or min(shape) < 1:
        raise ConfigError(
            f"{section}.shape={tuple(shape)}: expected 1 to 3 spatial axes, then channels, such as "
            "(32, 32, 3); vectors take the mlp network"
        )


def check_even(field: str, value: int) -> None:
    """Raises ConfigError, naming the next even size, for an odd one."""
    if value % 2:
        raise ConfigError(f"{field}={value}: expected an even number; nearest: {value + 1}")


def check_divides(field: str, value: int, whole: int, what: str) -> None:
    """Raises ConfigError, naming the nearest divisor, unless `value` divides `whole`."""
    if value < 1 or whole % value:
        divisors = [d for d in range(1, whole + 1) if whole % d == 0]
        near = min(divisors, key=lambda d: abs(d - value))
        raise ConfigError(f"{field}={value} does not divide {what} ({whole}); nearest: {near}")


def check_choice(field: str, value: str, known: Iterable[str]) -> None:
    """Raises ConfigError with the nearest known name unless `value` is one of `known`."""
    if value not in known:
        raise ConfigError(unknown_name(field, value, known))


def floating_dtype(field: str, value: Any) -> jnp.dtype:
    """The compute dtype that a name or type stands for; ConfigError unless it is floating."""
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ConfigError(f"{field}={value!r}: expected float32, bfloat16 or float16")
    return dtype


def check_common(
    section: str,
    num_classes: int,
    dropout: float,
    noise_input: str,
    dtype: Any,
    *,
    scalars: int = 0,
) -> jnp.dtype:
    """Checks the fields that every network has; returns the compute dtype."""
    if num_classes < 0:
        raise ConfigError(
            f"{section}.num_classes={num_classes}: expected 0 (unconditional) or more"
        )
    check_not_negative(section, scalars=scalars)
    if not 0 <= dropout < 1:
        raise ConfigError(f"{section}.dropout={dropout}: expected a probability in [0, 1)")
    check_choice(f"{section}.noise_input", noise_input, NOISE_SCALES)
    return floating_dtype(f"{section}.dtype", dtype)


def check_example(x: Array, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless the examples of `x` have the shape the network was built for."""
    if x.shape[1:] != shape:
        raise ValueError(f"x has examples of shape {x.shape[1:]}; the network takes {shape}")
