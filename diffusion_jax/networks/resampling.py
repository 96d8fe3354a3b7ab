"""Halving and doubling of feature maps by a fixed filter along every spatial axis."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion_jax.networks.conv import double

FILTERS = {"box": (1.0, 1.0), "fir": (1.0, 3.0, 3.0, 1.0)}
"""Taps before they are brought to a sum of one: `fir` is StyleGAN2's and NCSN++'s."""


def mean_pool(x: Float[Array, "b *space c"]) -> Float[Array, "b *out c"]:
    """Means of non-overlapping cells of two entries along every spatial axis, of even size."""
    b, *space, c = x.shape
    cells = x.reshape(b, *(n for size in space for n in (size // 2, 2)), c)
    return cells.mean(axis=tuple(range(2, 2 * len(space) + 1, 2)))


def halve(x: Float[Array, "b *space c"], kind: str) -> Float[Array, "b *out c"]:
    """Filters and keeps every other entry along every spatial axis (of even size); zeros outside.

    Args:
        kind: one of `FILTERS`; `box` is `mean_pool`.
    """
    if kind == "box":
        return mean_pool(x)
    for axis in range(1, x.ndim - 1):
        smooth = blur(x, kind, axis, (1, 1))
        x = jax.lax.slice_in_dim(smooth, 0, smooth.shape[axis], 2, axis)
    return x


def enlarge(x: Float[Array, "b *space c"], kind: str) -> Float[Array, "b *out c"]:
    """Puts a zero after every entry along every spatial axis and filters, keeping the mean.

    Args:
        kind: one of `FILTERS`; `box` repeats every entry.
    """
    if kind == "box":
        return double(x)
    for axis in range(1, x.ndim - 1):
        pairs = jnp.stack([x, jnp.zeros_like(x)], axis + 1)
        shape = (*x.shape[:axis], 2 * x.shape[axis], *x.shape[axis + 1 :])
        x = 2 * blur(pairs.reshape(shape), kind, axis, (2, 1))
    return x


def blur_all(x: Float[Array, "b *space c"], kind: str) -> Float[Array, "b *out c"]:
    """Filters along every spatial axis for a valid convolution of size 3 and stride 2 to follow,
    after which even sizes are halved and centres of cells stay where they are."""
    before = len(FILTERS[kind]) // 2
    for axis in range(1, x.ndim - 1):
        x = blur(x, kind, axis, (before, before))
    return x


def blur(
    x: Float[Array, "b *space c"], kind: str, axis: int, padding: tuple[int, int]
) -> Float[Array, "b *out c"]:
    """Filters along one axis after `padding` with zeros before and behind."""
    taps = FILTERS[kind]
    widths = [(0, 0)] * x.ndim
    widths[axis] = padding
    padded = jnp.pad(x, widths)
    size = padded.shape[axis] - len(taps) + 1
    parts = [
        (tap / sum(taps)) * jax.lax.slice_in_dim(padded, i, i + size, axis=axis)
        for i, tap in enumerate(taps)
    ]
    return sum(parts[1:], parts[0])
