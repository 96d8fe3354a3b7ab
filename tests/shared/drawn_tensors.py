"""Random weights from names, shapes and a seed: the same with any version of NumPy's generator.

Used by tests, and by the script that records what other libraries make of the same weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def draw(shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, np.ndarray]:
    """float32 tensors for which activations neither vanish nor grow."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name in sorted(shapes):
        values = rng.standard_normal(tuple(shapes[name]))
        if "embedding" in name or "token" in name:
            values *= 0.5
        elif values.ndim > 1:
            values *= np.prod(shapes[name][1:]) ** -0.5
        else:
            scales = name.endswith((".weight", ".lambda1"))
            values = 0.2 * values + scales
        tensors[name] = np.asarray(values, np.float32)
    return tensors
