"""Resizing as PIL and PyTorch do it: one matrix an axis, made on the host for sizes known there.

Let s = inside / outside be the step, c_i = (i + 1/2) s the centre of the output i in pixels of the
input, and k a kernel: the triangle, or Keys' cubic (1981, eq. 4) with parameter a.

    antialias      w_ij ~ k((j + 1/2 - c_i) / max(s, 1)), each row brought to a sum of one    (1)
    no antialias   w_ij = k(j + 1/2 - c_i), what falls outside added to the border pixel      (2)

(1) with a = -1/2 is PIL's `resize` and PyTorch's `interpolate(antialias=True)`; (2) with a = -3/4
is PyTorch's without. PIL holds the weights of 8-bit pictures as integers times 2^-22, and rounds to
8 bits after each of two passes: along rows first, then along columns. (Pillow 13 turns them round
for a picture whose height shrinks by much more than its width; published scores are older.)
"""

from __future__ import annotations

import functools
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, UInt8

from diffusion_jax.errors import unknown_name

KINDS = {"bilinear": 1.0, "bicubic": 2.0}
"""Kernels, with the distance from which on they are zero."""

_BITS = 22
_BASE = 256
_DIGITS = 3


def _kernel(distance: np.ndarray, kind: str, a: float) -> np.ndarray:
    x = np.abs(distance)
    if kind == "bilinear":
        return np.maximum(1.0 - x, 0.0)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


@functools.lru_cache(maxsize=64)
def interpolation_matrix(
    inside: int, outside: int, kind: str, *, antialias: bool = True, step: float | None = None
) -> Float[np.ndarray, "outside inside"]:
    """The float64 weights of `inside` pixels in each of `outside` pixels; do not write into it.

    Args:
        inside, outside: pixels along the axis, before and after.
        kind: one of `KINDS`.
        antialias: eq. 1, with a = -1/2; else eq. 2, with a = -3/4.
        step: pixels of the input from one output to the next, where it is not inside / outside:
            the inverse of a `scale_factor` of PyTorch. Only without antialias.

    Raises:
        ValueError: an unknown kind, an empty axis, or a step with antialias.
    """
    if kind not in KINDS:
        raise ValueError(unknown_name("kind", kind, KINDS))
    if inside < 1 or outside < 1:
        raise ValueError(f"a picture of {inside} pixels cannot be resized to {outside}")
    if antialias and step is not None:
        raise ValueError(f"step={step} is for resizing without antialias")
    step = inside / outside if step is None else step
    centres = (np.arange(outside) + 0.5) * step
    matrix = np.zeros((outside, inside))
    if antialias:
        wide = max(step, 1.0)
        reach = KINDS[kind] * wide
        low = np.maximum(np.trunc(centres - reach + 0.5), 0)
        high = np.minimum(np.trunc(centres + reach + 0.5), inside)
        index = np.arange(inside)
        # PIL multiplies by the inverse; a division may differ in the last bit, and then a weight.
        weights = _kernel((index - centres[:, None] + 0.5) * (1 / wide), kind, -0.5)
        matrix[:] = np.where((index >= low[:, None]) & (index < high[:, None]), weights, 0.0)
        matrix /= _row_sums(matrix)
    else:
        first = np.floor(centres - 0.5).astype(int)
        for tap in range(1 - int(KINDS[kind]), int(KINDS[kind]) + 1):
            weights = _kernel(first + tap + 0.5 - centres, kind, -0.75)
            np.add.at(matrix, (np.arange(outside), np.clip(first + tap, 0, inside - 1)), weights)
    matrix.flags.writeable = False
    return matrix


def _row_sums(matrix: np.ndarray) -> np.ndarray:
    """Sums from left to right, as a loop makes them."""
    return np.cumsum(matrix, axis=1)[:, -1:]


def resize(
    images: Float[Array, "b h w c"], shape: tuple[int, int], kind: str, *, antialias: bool = True
) -> Float[Array, "b new_h new_w c"]:
    """Resizes without rounding: `torch.nn.functional.interpolate(align_corners=False)`.

    With antialias also PIL's for pictures of mode F, one channel at a time (clean-fid).

    Raises:
        ValueError: as of `interpolation_matrix`.
    """
    for axis, size in ((2, shape[1]), (1, shape[0])):
        if images.shape[axis] != size:
            weights = interpolation_matrix(images.shape[axis], size, kind, antialias=antialias)
            images = _along(images, jnp.asarray(weights, jnp.float32), axis)
    return images


def resize_uint8(
    images: UInt8[Array, "b h w c"], shape: tuple[int, int], kind: str
) -> UInt8[Array, "b new_h new_w c"]:
    """Resizes as PIL does 8-bit pictures, with antialias: the same bytes, on every device.

    Raises:
        ValueError: as of `interpolation_matrix`; or an axis is reduced so far that sums are not
            exact (more than some hundred times).
    """
    for axis, size in ((2, shape[1]), (1, shape[0])):
        if images.shape[axis] != size:
            images = _along_uint8(images, _fixed_point(images.shape[axis], size, kind), axis)
    return images


def resize_and_crop_uint8(
    images: UInt8[Array, "b h w c"], size: int, kind: str
) -> UInt8[Array, "b size size c"]:
    """The middle of pictures whose shorter side was resized to `size` as PIL does.

    torchvision's `Resize(size)` and `CenterCrop(size)`: the longer side is rounded down, half a
    pixel of the margin to the even neighbour. What is cropped is never computed.

    Raises:
        ValueError: as of `resize_uint8`.
    """
    shorter = min(images.shape[1:3])
    for axis in (2, 1):
        whole = images.shape[axis] * size // shorter
        start = round((whole - size) / 2)
        if whole == images.shape[axis]:
            keep = (slice(None),) * axis + (slice(start, start + size),)
            images = images[keep]
        else:
            digits = _fixed_point(images.shape[axis], whole, kind)[:, start : start + size]
            images = _along_uint8(images, digits, axis)
    return images


def _along(images: Array, matrix: Array, axis: int) -> Array:
    """Multiplies along rows (axis 2) or columns (axis 1)."""
    return jnp.einsum("bhwc,vw->bhvc" if axis == 2 else "bhwc,uh->buwc", images, matrix)


@functools.lru_cache(maxsize=64)
def _fixed_point(inside: int, outside: int, kind: str) -> Int32[np.ndarray, "3 outside inside"]:
    """PIL's integer weights, as digits to the base 256 from -128 to 127, the highest first.

    Such digits and 8-bit pixels are exact in bfloat16, and their sums in float32: a product is
    exact in whatever precision a device multiplies.
    """
    weights = interpolation_matrix(inside, outside, kind) * 2**_BITS
    rest = np.trunc(weights + np.where(weights < 0, -0.5, 0.5)).astype(np.int64)
    digits = []
    for _ in range(_DIGITS - 1):
        digit = (rest + _BASE // 2) % _BASE - _BASE // 2
        digits.append(digit)
        rest = (rest - digit) // _BASE
    fixed = np.stack([rest, *digits[::-1]])
    largest = 255 * np.abs(fixed).sum(-1).max()
    if largest >= 2**24:
        raise ValueError(
            f"{inside} pixels cannot be resized to {outside}: at most a factor of about "
            f"{math.floor(inside / outside * 2**24 / largest)} is exact; reduce them before"
        )
    return fixed.astype(np.int32)


def _along_uint8(
    images: UInt8[Array, "b h w c"], digits: Int32[np.ndarray, "3 new old"], axis: int
) -> UInt8[Array, "b new_h new_w c"]:
    pixels = images.astype(jnp.float32)
    total = jnp.zeros((), jnp.int32)
    for digit in digits:
        part = _along(pixels, jnp.asarray(digit, jnp.float32), axis)
        total = total * _BASE + part.astype(jnp.int32)
    rounded = (total + (1 << (_BITS - 1))) >> _BITS
    return jnp.clip(rounded, 0, 255).astype(jnp.uint8)
