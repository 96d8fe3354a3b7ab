"""Resizing against Pillow, byte by byte, and against recorded results of PyTorch."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffusion_jax.evaluation.features import resizing

GOLDEN = Path(__file__).parents[2] / "golden" / "features"
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def pictures(height: int, width: int, *, number: int = 2) -> np.ndarray:
    """Noise, and black and white alone, whose overshoots are cut off."""
    rng = np.random.default_rng(height * 1000 + width)
    noise = rng.integers(0, 256, (number, height, width, 3), dtype=np.uint8)
    noise[-1] = np.where(noise[-1] < 128, 0, 255)
    return noise


def by_pillow(images: np.ndarray, shape: tuple[int, int], kind: str) -> np.ndarray:
    """In two calls: releases of Pillow differ in which axis one call resizes first."""
    filter_, (height, width) = FILTERS[kind], shape
    rows = [Image.fromarray(image).resize((width, image.shape[0]), filter_) for image in images]
    return np.stack([picture.resize((width, height), filter_) for picture in rows])


# Up, down, both, neither, to the least size, by much, and through sizes whose quotient is no
# binary fraction.
SIZES = [
    ((32, 32), (224, 224)),
    ((301, 213), (224, 224)),
    ((17, 200), (50, 31)),
    ((48, 48), (48, 48)),
    ((48, 31), (48, 62)),
    ((40, 40), (1, 1)),
    ((900, 20), (13, 20)),
]


@pytest.mark.parametrize("kind", resizing.KINDS)
@pytest.mark.parametrize(("inside", "outside"), SIZES)
def test_pictures_are_those_of_pillow_byte_by_byte(kind, inside, outside):
    images = pictures(*inside)
    ours = jax.jit(lambda x: resizing.resize_uint8(x, outside, kind))(images)
    np.testing.assert_array_equal(ours, by_pillow(images, outside, kind))


@pytest.mark.parametrize(("old", "new"), [(32, 224), (256, 224), (333, 224)])
def test_squares_in_one_call_of_pillow(old, new):
    images = pictures(old, old, number=1)
    expected = Image.fromarray(images[0]).resize((new, new), FILTERS["bicubic"])
    ours = resizing.resize_uint8(jnp.asarray(images), (new, new), "bicubic")
    np.testing.assert_array_equal(ours[0], expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "tensorfloat32", "float32"])
def test_bytes_do_not_depend_on_the_precision_of_products(dtype):
    images = pictures(61, 47)
    with jax.default_matmul_precision(dtype):
        ours = resizing.resize_uint8(jnp.asarray(images), (24, 24), "bicubic")
    np.testing.assert_array_equal(ours, by_pillow(images, (24, 24), "bicubic"))


def test_digits_fit_into_bfloat16():
    digits = resizing._fixed_point(301, 224, "bicubic")
    assert np.abs(digits).max() <= 128
    weights = digits.astype(np.int64).T @ np.array([2**16, 2**8, 1])
    expected = resizing.interpolation_matrix(301, 224, "bicubic").T * 2**22
    assert np.abs(weights - expected).max() <= 0.5


@pytest.mark.parametrize("shape", [(40, 61), (61, 40), (40, 40), (24, 37), (37, 24), (24, 31)])
def test_the_middle_of_the_shorter_side(shape):
    images = pictures(*shape)
    ours = resizing.resize_and_crop_uint8(jnp.asarray(images), 24, "bicubic")
    shorter = min(shape)
    whole = tuple(int(24 * side / shorter) for side in shape)
    resized = by_pillow(images, whole, "bicubic")
    top, left = (round((side - 24) / 2.0) for side in whole)
    np.testing.assert_array_equal(ours, resized[:, top : top + 24, left : left + 24])


@pytest.mark.parametrize("kind", resizing.KINDS)
def test_floats_are_those_of_pillow_one_channel_at_a_time(kind):
    images = pictures(45, 33)
    ours = resizing.resize(jnp.asarray(images, jnp.float32), (20, 64), kind)
    channels = [
        np.asarray(Image.fromarray(channel).resize((64, 20), FILTERS[kind]))
        for image in images.astype(np.float32)
        for channel in np.moveaxis(image, -1, 0)
    ]
    expected = np.moveaxis(np.reshape(channels, (2, 3, 20, 64)), 1, -1)
    np.testing.assert_allclose(ours, expected, atol=2e-4)


def test_floats_are_those_of_pytorch():
    recorded = np.load(GOLDEN / "interpolate.npz")
    image = recorded["image"]
    names = [name for name in recorded.files if name != "image"]
    assert len(names) == 10
    for name in names:
        kind, antialias, height, width = name.split("_")[:4]
        shape = (int(height), int(width))
        if "step" in name:
            height, width = (
                resizing.interpolation_matrix(
                    old, new, kind, antialias=False, step=old / (new + 0.1)
                )
                for old, new in zip(image.shape[1:3], shape, strict=True)
            )
            ours = np.einsum("uh,vw,bhwc->buvc", height, width, image)
        else:
            ours = resizing.resize(
                jnp.asarray(image), shape, kind, antialias=antialias == "antialias"
            )
        # Its weights are made in single precision: a few units in the sixth digit.
        np.testing.assert_allclose(ours, recorded[name], atol=2e-5, err_msg=name)


def test_what_cannot_be_resized():
    with pytest.raises(ValueError, match="kind='cubic' is unknown"):
        resizing.interpolation_matrix(4, 2, "cubic")
    with pytest.raises(ValueError, match="0 pixels"):
        resizing.interpolation_matrix(0, 2, "bicubic")
    with pytest.raises(ValueError, match="step=2"):
        resizing.interpolation_matrix(4, 2, "bicubic", step=2.0)
    with pytest.raises(ValueError, match="reduce them before"):
        resizing._fixed_point(4000, 2, "bicubic")
