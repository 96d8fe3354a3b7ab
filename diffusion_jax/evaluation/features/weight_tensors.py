"""From the tensors of a published file to the parameters of a feature network.

A file that holds those of another network is refused in one line: its path, what is missing, too
much or of another shape, and the hash of its tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffusion_jax.errors import ConfigError
from diffusion_jax.evaluation.features.protocol import params_hash

Shape = tuple[int, ...]
COUNTERS = r".*\.num_batches_tracked$"
"""Beside the statistics of PyTorch's batch normalisation; no part of the mathematics."""
_SHOWN = 3


class Tensors:
    """The tensors of one file.

    Args:
        tensors: name -> array, as read.
        path: of the file, for messages.
        network: whose weights they should be, for messages.
    """

    def __init__(self, tensors: Mapping[str, np.ndarray], path: str, network: str):
        self._tensors, self._path, self._network = tensors, path, network

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def count(self, pattern: str) -> int:
        """One more than the largest number that the group of `pattern` matches; 0 for none."""
        found = (re.match(pattern, name) for name in self._tensors)
        return max((int(match[1]) + 1 for match in found if match), default=0)

    def shape(self, name: str, rank: int) -> Shape:
        """The shape of one tensor that tells the sizes.

        Raises:
            ConfigError: there is none of this name and rank.
        """
        if name not in self._tensors:
            raise self.refused(f"there is no {name}")
        shape = self._tensors[name].shape
        if len(shape) != rank or 0 in shape:
            raise self.refused(f"{name} is {_words(shape)}, not of rank {rank}")
        return shape

    def check(self, expected: Mapping[str, Shape], ignored: str) -> None:
        """Compares all names and shapes, and whether values are finite floats.

        Args:
            expected: name -> shape.
            ignored: a regular expression of what may be there besides.

        Raises:
            ConfigError: in one line, the first differences of each kind.
        """
        held = self._tensors
        missing = [name for name in expected if name not in held]
        extra = [name for name in held if name not in expected and not re.match(ignored, name)]
        there = [name for name in expected if name in held]
        shapes = [
            f"{name} {_words(held[name].shape)} instead of {_words(expected[name])}"
            for name in there
            if held[name].shape != expected[name]
        ]
        kinds = {
            "missing": missing,
            "unexpected": extra,
            "of another shape": shapes,
            "not of finite floats": [name for name in there if not _is_finite(held[name])],
        }
        faults = [f"{kind}: {_some(names)}" for kind, names in kinds.items() if names]
        if faults:
            raise self.refused("; ".join(faults))

    def refused(self, reason: str) -> ConfigError:
        """The error that names file, network, reason, and the hash of what the file holds."""
        number = len(self._tensors)
        return ConfigError(
            f"{self._path}: not the weights of {self._network}: {reason} "
            f"({number} tensors, hash {params_hash(dict(self._tensors))})"
        )

    def float32(self, name: str) -> np.ndarray:
        """One tensor in single precision."""
        return np.asarray(self._tensors[name], np.float32)

    def linear(self, names: Sequence[str], *, bias: bool = True) -> dict[str, np.ndarray]:
        """Layers of PyTorch, beside each other, as one kernel [in, out] and its bias."""
        weights = [self.float32(f"{name}.weight") for name in names]
        layer = {"kernel": np.ascontiguousarray(np.concatenate(weights).T)}
        if bias:
            layer["bias"] = np.concatenate([self.float32(f"{name}.bias") for name in names])
        return layer

    def tree(self, names: Iterable[str]) -> dict[str, Any]:
        """A nested dict with one level a part of the dotted names, channels last.

        PyTorch's [out, in, height, width] becomes [height, width, in, out], [out, in] [in, out].
        """
        tree: dict[str, Any] = {}
        for name in names:
            *path, last = name.split(".")
            level = tree
            for part in path:
                level = level.setdefault(part, {})
            array = self.float32(name)
            axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(array.ndim)
            level[last] = array if axes is None else np.ascontiguousarray(array.transpose(axes))
        return tree

    def norm(self, name: str) -> dict[str, np.ndarray]:
        """A layer norm of PyTorch."""
        return {"scale": self.float32(f"{name}.weight"), "bias": self.float32(f"{name}.bias")}


def linear_shapes(
    names: Sequence[str], inside: int, outside: int, *, bias: bool = True
) -> dict[str, Shape]:
    """The shapes of layers of PyTorch which together have `outside` outputs."""
    part = outside // len(names)
    shapes: dict[str, Shape] = {f"{name}.weight": (part, inside) for name in names}
    return shapes | ({f"{name}.bias": (part,) for name in names} if bias else {})


def norm_shapes(name: str, width: int) -> dict[str, Shape]:
    """The shapes of a layer norm of PyTorch."""
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _words(shape: Shape) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _some(names: Sequence[str]) -> str:
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _is_finite(array: np.ndarray) -> bool:
    # Types of two bytes beside NumPy's own know no isfinite of their own.
    floats = jnp.issubdtype(array.dtype, jnp.floating)
    return floats and bool(np.isfinite(np.asarray(array, np.float32)).all())
