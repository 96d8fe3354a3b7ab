"""From the tensors of a published file to the parameters of a feature network."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffusion_jax.errors import ConfigError
from diffusion_jax.evaluation.features.protocol import HASH_DIGITS, params_hash

Shape = tuple[int, ...]
# A count of batches beside the statistics of PyTorch's batch normalisation; no part of the maths.
_COUNTER = ".num_batches_tracked"
_NAMED = 3


def file_hash(path: str) -> str | None:
    """16 hexadecimal digits of a file's SHA-256; None where there is no such file."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:HASH_DIGITS]
    except OSError:
        return None


def check_tensors(
    tensors: Mapping[str, np.ndarray], shapes: Mapping[str, Shape], *, network: str, path: str
) -> dict[str, np.ndarray]:
    """The tensors named in `shapes`, as float32.

    Counters of batch normalisation are left out; anything else that is too much is an error.

    Raises:
        ConfigError: names or shapes differ, or values are no finite floats. The line gives the
            file, the hash of its tensors and the first differences of each kind.
    """
    found = {name: array for name, array in tensors.items() if not name.endswith(_COUNTER)}
    problems = [
        _listed("missing", [name for name in shapes if name not in found]),
        _listed("unexpected", [name for name in found if name not in shapes]),
    ]
    shared = [name for name in shapes if name in found]
    problems.append(
        _listed(
            "of another shape",
            [
                f"{name} {list(found[name].shape)} instead of {list(shapes[name])}"
                for name in shared
                if found[name].shape != shapes[name]
            ],
        )
    )
    problems.append(
        _listed("not of finite floats", [name for name in shared if not _finite(found[name])])
    )
    text = "; ".join(problem for problem in problems if problem)
    if text:
        raise ConfigError(
            f"{path}: not the weights of {network} (hash of its tensors "
            f"{params_hash(dict(tensors))}): {text}"
        )
    return {name: np.asarray(found[name], np.float32) for name in shapes}


def to_tree(
    tensors: Mapping[str, np.ndarray], change: Callable[[np.ndarray], np.ndarray]
) -> dict[str, Any]:
    """A nested dict with one level a part of the dotted name; `change` is done to each tensor."""
    tree: dict[str, Any] = {}
    for name, array in tensors.items():
        *path, last = name.split(".")
        level = tree
        for part in path:
            level = level.setdefault(part, {})
        level[last] = change(array)
    return tree


def channels_last(array: np.ndarray) -> np.ndarray:
    """PyTorch's [out, in, height, width] as [height, width, in, out]; [out, in] as [in, out]."""
    axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(array.ndim)
    return array if axes is None else np.ascontiguousarray(array.transpose(axes))


def _listed(what: str, names: list[str]) -> str:
    more = f", and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{what}: {', '.join(names[:_NAMED])}{more}" if names else ""


def _finite(array: np.ndarray) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating) and bool(np.isfinite(array).all())
