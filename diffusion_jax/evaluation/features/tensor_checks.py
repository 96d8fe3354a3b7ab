"""Tensors as a file of weights holds them, and whether they are those of a given network."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from diffusion_jax.errors import ConfigError
from diffusion_jax.evaluation.features.protocol import params_hash

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

    def shape(self, name: str, rank: int) -> tuple[int, ...]:
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

    def check(self, expected: Mapping[str, tuple[int, ...]], ignored: str) -> None:
        """Compares all names and shapes, and whether values are finite.

        Args:
            expected: name -> shape.
            ignored: a regular expression of what may be there besides.

        Raises:
            ConfigError: in one line, what is missing, unexpected, of another shape or not finite.
        """
        held = self._tensors
        missing = [name for name in expected if name not in held]
        extra = [name for name in held if name not in expected and not re.match(ignored, name)]
        there = [name for name in expected if name in held]
        shapes = [
            f"{name} {_words(held[name].shape)} for {_words(expected[name])}"
            for name in there
            if held[name].shape != expected[name]
        ]
        wild = [name for name in there if not _is_finite(held[name])]
        kinds = {"missing": missing, "unexpected": extra, "shapes": shapes, "not finite": wild}
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

    def norm(self, name: str) -> dict[str, np.ndarray]:
        """A layer norm of PyTorch."""
        return {"scale": self.float32(f"{name}.weight"), "bias": self.float32(f"{name}.bias")}


def linear_shapes(
    names: Sequence[str], inside: int, outside: int, *, bias: bool = True
) -> dict[str, tuple[int, ...]]:
    """The shapes of layers of PyTorch which together have `outside` outputs."""
    part = outside // len(names)
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (part, inside) for name in names}
    return shapes | ({f"{name}.bias": (part,) for name in names} if bias else {})


def norm_shapes(name: str, width: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a layer norm of PyTorch."""
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _words(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _is_finite(array: np.ndarray) -> bool:
    # Types of two bytes beside NumPy's own know no isfinite of their own.
    return bool(np.isfinite(np.asarray(array, np.float32)).all())
