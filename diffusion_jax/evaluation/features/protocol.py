"""What a feature network is, and the hash by which a score names its weights."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

PyTree = Any
HASH_DIGITS = 16
OWN = "self"
"""Name of the network that learned from the data, and knows their classes alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureNetwork:
    """Pictures in, features out.

    Attributes:
        name: of the network, such as "inception_v3".
        score: what a Frechet distance over its features is called. Only that over the Inception
            network with its published weights is called FID.
        params: a nested dict of float32 arrays.
        apply: `(params, uint8 [B, H, W, 3]) -> {name: float32 [B, D]}`, pure; it resizes and scales
            as its authors do. "features" is always among them; "spatial" (sFID) and "logits"
            (class scores before the softmax) where it has them.
        resize: how it resizes, in words.
        weights_hash: `params_hash(params)`.
        options: what its features depend on besides, in words; "" where there is no choice.
        remark: what a reader has to know about it, such as which options were assumed.
        maps: `(params, uint8 [B, H, W, 3]) -> (float32 [B, h, w, C], ...)`, what layers of several
            depths put out, pure, resized and scaled as in `apply`; None where none are given.
    """

    name: str
    score: str
    params: PyTree
    apply: Callable[[PyTree, Any], Mapping[str, Any]]
    resize: str
    weights_hash: str
    options: str = ""
    remark: str = ""
    maps: Callable[[PyTree, Any], Sequence[Any]] | None = None


def params_hash(params: PyTree) -> str:
    """16 hexadecimal digits of the SHA-256 of a tree's names, shapes, types and values."""
    digest = hashlib.sha256()
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    for path, leaf in sorted(
        ((jax.tree_util.keystr(path), leaf) for path, leaf in leaves), key=lambda pair: pair[0]
    ):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{path} {array.shape} {array.dtype.str}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:HASH_DIGITS]
