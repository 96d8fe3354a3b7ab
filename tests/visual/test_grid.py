"""Where the pixels of each image come to lie."""

from __future__ import annotations

import numpy as np
import pytest

from diffusion_jax.visual import image_grid


def random_images(*shape):
    return np.random.default_rng(0).integers(0, 250, shape, dtype=np.uint8)


def test_images_lie_in_rows_with_padding_between():
    images = random_images(5, 4, 6, 3)
    grid = image_grid(images, columns=3, scale=1, padding=2)
    assert grid.shape == (2 + 2 * (4 + 2), 2 + 3 * (6 + 2), 3)
    covered = np.zeros(grid.shape[:2], bool)
    for i, (top, left) in enumerate([(2, 2), (2, 10), (2, 18), (8, 2), (8, 10)]):
        np.testing.assert_array_equal(grid[top : top + 4, left : left + 6], images[i])
        covered[top : top + 4, left : left + 6] = True
    assert (grid[~covered] == 255).all()


@pytest.mark.parametrize(
    ("count", "rows", "columns"), [(1, 1, 1), (2, 1, 2), (9, 3, 3), (10, 3, 4)]
)
def test_the_grid_is_as_square_as_it_can_be(count, rows, columns):
    grid = image_grid(random_images(count, 70, 70, 1), padding=0)
    assert grid.shape == (70 * rows, 70 * columns, 1)


def test_tiny_images_grow_by_whole_pixels():
    images = random_images(1, 8, 8, 1)
    grid = image_grid(images, padding=0)
    assert grid.shape == (64, 64, 1)
    for dy in (0, 7):
        for dx in (0, 7):
            np.testing.assert_array_equal(grid[dy::8, dx::8], images[0])
    assert image_grid(random_images(1, 100, 30, 3), padding=0).shape == (100, 30, 3)


def test_transparent_pixels_show_the_background():
    images = np.zeros((1, 1, 3, 4), np.uint8)
    images[0, 0, :, :3] = 100
    images[0, 0, :, 3] = [0, 255, 51]  # 51 / 255 = 1 / 5
    grid = image_grid(images, scale=1, padding=0)
    assert grid[0, :, 0].tolist() == [255, 100, 224]
    over_black = image_grid(images, scale=1, padding=0, background=0)
    assert over_black[0, :, 0].tolist() == [0, 100, 20]


def test_labels_stand_below_their_images_and_touch_nothing_else():
    images = random_images(4, 40, 40, 1)
    plain = image_grid(images, columns=2, labels=["", "", "", ""])
    grid = image_grid(images, columns=2, labels=["7", "", "a label wider than its image", "x"])
    assert grid.shape == plain.shape
    assert grid.shape[2] == 3
    cell = (grid.shape[0] - 2) // 2
    for i, (row, column) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        top, left = 2 + row * cell, 2 + column * 42
        np.testing.assert_array_equal(grid[top : top + 40, left : left + 40, 1], images[i, ..., 0])
        below = grid[top + 40 : top + cell - 2, left : left + 40]
        assert (below < 200).any() == (i != 1)
    changed = (grid != plain).any(axis=(0, 2))
    assert not changed[42:44].any()  # the long label is cut at the width of its image


@pytest.mark.parametrize(
    ("shape", "options", "words"),
    [
        ((0, 4, 4, 1), {}, "images is empty"),
        ((1, 4, 4, 2), {}, "2 channels"),
        ((2, 4, 4, 1), {"labels": ["a"]}, "labels has 1 entries; expected 2"),
    ],
)
def test_impossible_grids_are_refused(shape, options, words):
    with pytest.raises(ValueError, match=words):
        image_grid(random_images(*shape), **options)
