"""Adaptive gradient clipping: each unit's gradient is bounded by its weights' own size.

    G_i <- lambda max(|W_i|, eps) / |G_i| G_i    where |G_i| > lambda max(|W_i|, eps)          (1)

over the units i of a layer (Brock et al. 2021, arXiv:2102.06171, eq. 3). A unit is what feeds one
output channel: a column of a matrix, all taps of a convolution that lead to one channel, a whole
bias or norm. Layers that are stacked for a scan are clipped one by one, which is why
`optax.adaptive_grad_clip`, which goes by the number of axes alone, is not used.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax

from diffusion_jax.training.paths import input_axes, map_with_names

PyTree = Any


def adaptive_clip(limit: float, *, eps: float = 1e-3) -> optax.GradientTransformation:
    """Equation (1); needs the parameters and keeps no state.

    Args:
        limit: lambda, the largest |G_i| / |W_i|; 0.01 to 0.1 in the paper.
        eps: norm that a smaller weight counts with, so that weights that start at 0 can leave it.
    """

    def clip(path: str, grad: Any, param: Any) -> Any:
        axes = input_axes(path, grad)
        bound = limit * jnp.maximum(_norm(param.astype(jnp.float32), axes), eps)
        norm = _norm(grad, axes)
        return grad * jnp.where(norm > bound, bound / jnp.where(norm > 0, norm, 1.0), 1.0)

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        return map_with_names(clip, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _norm(values: Any, axes: tuple[int, ...]) -> Any:
    return jnp.sqrt(jnp.sum(jnp.square(values), axis=axes, keepdims=True))
