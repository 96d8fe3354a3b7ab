"""Values to pixels with the right rounding, and files that are whole or absent."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.visual import save_png, to_uint8
from diffusion_jax.visual.pixels import replace_file


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_pixel_value_survives_the_round_trip(dtype):
    values = np.arange(256)
    np.testing.assert_array_equal(to_uint8((values / 127.5 - 1.0).astype(dtype)), values)


def test_values_go_to_the_nearest_level_without_bias():
    x = np.random.default_rng(0).uniform(-1.0, 1.0, 100_000)
    back = to_uint8(x) / 127.5 - 1.0
    half_level = 0.5 / 127.5
    assert np.abs(back - x).max() <= half_level + 1e-12
    # Truncation would shift the mean by half a level, 50 times this.
    assert abs((back - x).mean()) < half_level / 50


def test_the_one_exact_half_goes_to_the_even_level():
    # (x + 1) * 127.5 = k + 1/2 has one solution in binary fractions: 127.5 at 0.
    assert to_uint8(np.array([0.0, -0.0])).tolist() == [128, 128]


def test_values_outside_are_clipped_and_nan_is_black():
    x = np.array([-1e30, -1.5, 1.5, np.inf, -np.inf, np.nan], np.float32)
    assert to_uint8(x).tolist() == [0, 0, 255, 255, 0, 0]


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_png_holds_the_pixels(tmp_path, channels, mode):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, channels), dtype=np.uint8)
    path = save_png(tmp_path / "new" / "folder" / "image.png", pixels)
    with Image.open(path) as image:
        assert image.mode == mode
        np.testing.assert_array_equal(np.asarray(image).reshape(5, 7, channels), pixels)
    assert [p.name for p in path.parent.iterdir()] == ["image.png"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(b"old")

    def fail(temporary):
        temporary.write_bytes(b"half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        replace_file(path, fail)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["image.png"]
