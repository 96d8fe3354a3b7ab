"""Muon: momentum whose singular values are all brought to one.

    M <- beta M + (1 - beta) G,     direction = rms sqrt(max(m, n)) U V^T,    M = U S V^T       (1)

with U V^T from a few Newton-Schulz iterations (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon), which end with singular values between about 0.7 and
1.2. U V^T of an m x n matrix has elements of root mean square 1 / sqrt(max(m, n)); the factor
makes it `rms`, and 0.2 is what AdamW's updates have, so that both go with one learning rate (Liu
et al. 2025, arXiv:2502.16982, eq. 4).

The iteration is `optax.contrib.scale_by_muon`. What a matrix is, is said here: a kernel summed
over all axes but its last, as a convolution is when its taps are laid side by side; where layers
are stacked for a scan, one matrix for each layer. A fused kernel (query, key and value) is one
matrix. The momentum has the shape and path of its parameter, and so its sharding.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable
from typing import Any

import optax
from optax import contrib

from diffusion_jax.training.paths import OBJECTIVE_PARAMS, input_axes, layer_ndim, map_with_names

PyTree = Any
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of X, (X X^T) X and (X X^T)^2 X, of the greatest slope at 0 (Jordan et al.)."""

ADAMW_PATTERN = r"(^|/)(stem|bottleneck|head|smooth|noise|label|scalar)/"
"""First and last layers, in whose rows or columns is the data's or a number's own unit. Embedding
tables and norms need no pattern: they are called otherwise than `kernel`."""


def is_hidden_matrix(path: str, param: Any, other_pattern: str = ADAMW_PATTERN) -> bool:
    """Whether Muon takes a parameter: a `kernel` of two or more axes, of a hidden layer."""
    return (
        path.rpartition("/")[2] == "kernel"
        and layer_ndim(path, param) > 1
        and not re.search(other_pattern, path)
        and not re.search(OBJECTIVE_PARAMS, path)
    )


def scale_by_muon_or(
    other: optax.GradientTransformation,
    *,
    beta: float = 0.95,
    nesterov: bool = True,
    steps: int = 5,
    rms: float = 0.2,
    other_pattern: str = ADAMW_PATTERN,
) -> optax.GradientTransformation:
    """(1) for hidden matrices, `other` for all other parameters.

    Args:
        other: direction of embeddings, norms, first and last layers.
        beta: decay of the momentum.
        nesterov: orthogonalises beta M + (1 - beta) G in place of M.
        steps: Newton-Schulz iterations.
        rms: root mean square of the direction's elements.
        other_pattern: kernels whose path it is found in go to `other`.
    """

    def labels(params: PyTree) -> PyTree:
        return map_with_names(
            lambda path, p: "muon" if is_hidden_matrix(path, p, other_pattern) else "other", params
        )

    # Given as a table the coefficients are scanned over: a program a fifth of the unrolled one.
    orthogonal = contrib.scale_by_muon(
        ns_coeffs=(NEWTON_SCHULZ,) * steps,
        ns_steps=steps,
        beta=beta,
        nesterov=nesterov,
        weight_dimension_numbers=_matrices,
    )
    directions: dict[Hashable, optax.GradientTransformation] = {
        "muon": optax.chain(orthogonal, _with_rms(rms)),
        "other": other,
    }
    return optax.partition(directions, labels)


def _matrices(params: PyTree) -> PyTree:
    """Which axes of each parameter are rows and columns; the rest count its matrices."""
    return map_with_names(
        lambda path, p: contrib.MuonDimensionNumbers(
            reduction_axis=input_axes(path, p), output_axis=p.ndim - 1
        ),
        params,
    )


def _with_rms(rms: float) -> optax.GradientTransformation:
    def scale(path: str, update: Any) -> Any:
        inputs = [update.shape[axis] for axis in input_axes(path, update)]
        return update * (rms * math.sqrt(max(math.prod(inputs), update.shape[-1])))

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        return map_with_names(scale, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
