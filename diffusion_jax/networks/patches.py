"""Images of any number of spatial axes as sequences of patches, and the positions of these."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from diffusion_jax.errors import ConfigError
from diffusion_jax.networks.embeddings import sincos_positions
from diffusion_jax.networks.positions import axial_angles, check_rotary
from diffusion_jax.networks.validation import check_choice, check_divides

POSITIONS = ("sincos", "learned", "rope")


def learned_tokens(number: int, dim: int, rngs: nnx.Rngs) -> nnx.Param[Array] | None:
    """Parameters `[number, dim]` of standard deviation 0.02, or None for no token."""
    if not number:
        return None
    normal = nnx.initializers.normal(0.02)
    return nnx.Param(normal(rngs.params(), (number, dim), jnp.float32))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the patches of a network stand.

    Attributes:
        kind: one of `POSITIONS`.
        grid: patches along each axis.
        dim: width of the tokens.
        heads: attention heads.
    """

    kind: str
    grid: tuple[int, ...]
    dim: int
    heads: int

    def table(self, rngs: nnx.Rngs, before: int = 0) -> nnx.Param[Array] | None:
        """The learned positions of `before` tokens and the patches; None for other kinds."""
        if self.kind != "learned":
            return None
        return learned_tokens(before + math.prod(self.grid), self.dim, rngs)

    def place(
        self, patches: Float[Array, "b n d"], table: nnx.Param[Array] | None
    ) -> Float[Array, "b n d"]:
        """The patches with their position added, where positions are added at all."""
        if table is not None:
            return patches + table[-patches.shape[1] :].astype(patches.dtype)
        if self.kind == "sincos":
            return patches + jnp.asarray(sincos_positions(self.grid, self.dim), patches.dtype)
        return patches

    def angles(self, before: int) -> Float[np.ndarray, "n pairs"] | None:
        """Rotary angles for `before` tokens without a place and the patches; None without."""
        if self.kind != "rope":
            return None
        return axial_angles(self.grid, self.dim // self.heads, before=before)


def make_layout(
    section: str, kind: str, shape: Sequence[int], patch: int, dim: int, heads: int
) -> Layout:
    """The layout of patches of examples of `shape`, channels last.

    Raises:
        ConfigError: `patch` does not divide all sides, or the kind of positions does not fit the
            sizes; names `<section>.<field>`.
    """
    space = tuple(shape[:-1])
    check_divides(f"{section}.patch", patch, math.gcd(*space), f"all sides of {space}")
    check_choice(f"{section}.positions", kind, POSITIONS)
    axes = len(space)
    if kind == "sincos" and dim % (2 * axes):
        raise ConfigError(
            f"{section}.dim={dim}: sincos positions over {axes} axes need a multiple of "
            f"{2 * axes}; or positions=learned"
        )
    if kind == "rope":
        check_rotary(f"{section}.heads", dim, heads, axes)
    grid = tuple(size // patch for size in space)
    return Layout(kind=kind, grid=grid, dim=dim, heads=heads)


def to_patches(x: Float[Array, "b *space c"], patch: int) -> Float[Array, "b n p"]:
    """Cuts every spatial axis into patches: tokens in C order, a patch flattened in C order."""
    b, *space, c = x.shape
    rank = len(space)
    split = x.reshape(b, *(n for size in space for n in (size // patch, patch)), c)
    order = [0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), 2 * rank + 1]
    return split.transpose(order).reshape(b, -1, patch**rank * c)


def from_patches(
    tokens: Float[Array, "b n p"], grid: Sequence[int], patch: int, channels: int
) -> Float[Array, "b *space c"]:
    """The inverse of `to_patches`."""
    rank, b = len(grid), tokens.shape[0]
    split = tokens.reshape(b, *grid, *(patch,) * rank, channels)
    order = [0, *(n for i in range(rank) for n in (1 + i, 1 + rank + i)), 2 * rank + 1]
    return split.transpose(order).reshape(b, *(n * patch for n in grid), channels)
