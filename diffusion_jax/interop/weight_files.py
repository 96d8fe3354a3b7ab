"""Files of weights, as others publish them: safetensors, and what `torch.save` writes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from diffusion_jax.errors import ConfigError
from diffusion_jax.interop.pickled_data import Malformed, Refused, shown
from diffusion_jax.interop.torch_files import STREAM_START, ZIP_START, read_stream, read_zip

# Training checkpoints hold the weights under one of these, beside optimizer state and counters.
WRAPPERS = ("state_dict", "model")
_HALVES = (np.dtype(np.float16), np.dtype(jnp.bfloat16))


def read_tensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """All tensors of a file by their names, half-precision ones as float32.

    The form is told by the content, not by the ending: safetensors, or a state dict saved by
    PyTorch (`.pth`, `.pt`, `.bin`). No pickle is run: besides tensors and plain containers a file
    may mention nothing. Of a training checkpoint, the entry `state_dict` or `model` is taken.

    Raises:
        ConfigError: the file is missing, damaged, of another form, or its pickle mentions anything
            else; the line names the file and what was found.
    """
    path = os.fspath(path)
    try:
        with open(path, "rb") as file:
            start = file.read(9)
        if start[: len(ZIP_START)] == ZIP_START:
            tensors = _named_tensors(read_zip(path))
        # Before pickles: the first byte is the lowest of a length, and may be as theirs.
        elif start[5:] == b"\0\0\0{":
            tensors = _of_safetensors(path)
        elif start[:1] == STREAM_START:
            tensors = _named_tensors(read_stream(path))
        else:
            raise Malformed("neither safetensors nor written by torch.save")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    except Refused as error:
        raise ConfigError(
            f"{path}: holds {error}; only tensors and plain containers are read, never run"
        ) from error
    except Malformed as error:
        raise ConfigError(f"{path}: damaged or no file of weights: {error}") from error
    if not tensors:
        raise ConfigError(f"{path}: holds no tensors")
    return {
        name: array.astype(np.float32) if array.dtype in _HALVES else array
        for name, array in tensors.items()
    }


def _of_safetensors(path: str) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, TypeError, ValueError) as error:
        raise Malformed(str(error)) from error


def _named_tensors(tree: Any) -> dict[str, np.ndarray]:
    # One wrapper in another at most: a dictionary may hold itself.
    for _ in range(2):
        held = tree if isinstance(tree, Mapping) else {}
        inner = [held[name] for name in WRAPPERS if isinstance(held.get(name), Mapping)]
        tree = inner[0] if inner else tree
    if not isinstance(tree, Mapping):
        raise Refused(f"a {type(tree).__name__} instead of a state dict")
    for name, value in tree.items():
        if not (isinstance(name, str) and isinstance(value, np.ndarray)):
            raise Refused(f"a {type(value).__name__} under '{shown(name)}' instead of a tensor")
    return dict(tree)
