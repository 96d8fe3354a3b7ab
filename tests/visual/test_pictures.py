"""Points, bits and trajectories."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.visual import bit_rows, image_grid, picture, point_plot, to_uint8, trajectory_gif

EMPTY = point_plot(np.zeros((0, 2)))


def inked(points, **options):
    """Rows and columns of the pixels that differ from an empty plot."""
    return np.argwhere((point_plot(np.array(points), **options) != EMPTY).any(axis=-1))


def test_a_point_lies_where_its_coordinates_say():
    centre = (np.array(EMPTY.shape[:2]) - 1) / 2
    unit = (EMPTY.shape[0] - 32) / 4  # pixels for 1.0, with axes from -2 to 2
    for x, y in [(0.0, 0.0), (1.5, 0.0), (0.0, 1.5), (-1.0, -0.5)]:
        row, column = inked([[x, y]]).mean(axis=0) - centre
        assert (column / unit, -row / unit) == pytest.approx((x, y), abs=1.5 / unit)


def test_the_range_moves_and_scales_the_axes():
    plain = inked([[0.5, -0.5]])
    scaled = np.argwhere(
        (
            point_plot(np.array([[50.0, -50.0]]), (-200.0, 200.0))
            != point_plot(np.zeros((0, 2)), (-200.0, 200.0))
        ).any(axis=-1)
    )
    np.testing.assert_array_equal(plain, scaled)


def test_points_outside_or_not_finite_are_not_drawn():
    assert len(inked([[2.5, 0.0], [0.0, -9.0], [np.nan, 0.0], [0.0, np.inf]])) == 0
    assert len(inked([[2.5, 0.0], [0.0, 0.0]])) == len(inked([[0.0, 0.0]]))


def test_dense_places_are_darker():
    rng = np.random.default_rng(0)
    left = rng.uniform([-1.8, -1.8], [-0.2, 1.8], (18_000, 2))
    right = rng.uniform([0.2, -1.8], [1.8, 1.8], (2_000, 2))
    plot = point_plot(np.concatenate([left, right])).astype(float)
    side = plot.shape[1]
    assert (
        plot[60:-60, side // 8 : side // 3].mean() + 20
        < plot[60:-60, -side // 3 : -side // 8].mean()
    )


def test_an_empty_range_is_refused():
    with pytest.raises(ValueError, match="low < high"):
        point_plot(np.zeros((1, 2)), (1.0, 1.0))


def test_ones_are_dark_and_each_sequence_has_a_row():
    bits = np.random.default_rng(0).integers(0, 2, (3, 20))
    image = bit_rows(bits, columns=1)
    cells = image[2:, 2:, 0].reshape(3, 10, 162)[:, :8, :160].reshape(3, 8, 20, 8)
    np.testing.assert_array_equal(cells, 255 * (1 - bits)[:, None, :, None] + np.zeros_like(cells))


def test_probabilities_come_out_grey():
    values = bit_rows(np.array([[0.0, 0.2, 1.0]]), columns=1)[4, 6::8, 0]
    assert values.tolist() == [255, 204, 0]


def test_many_sequences_stand_side_by_side():
    height, width, _ = bit_rows(np.zeros((400, 20))).shape
    assert 0.5 < height / width < 2.0


def test_picture_chooses_by_kind():
    rng = np.random.default_rng(0)
    images, points, bits = rng.uniform(-1, 1, (4, 8, 8, 1)), rng.normal(size=(9, 2)), np.eye(5)
    grid = image_grid(to_uint8(images), labels=list("abcd"))
    np.testing.assert_array_equal(picture(images, "image", labels=list("abcd")), grid)
    np.testing.assert_array_equal(picture(to_uint8(images), "image", labels=list("abcd")), grid)
    plot = point_plot(points, (-3.0, 3.0))
    np.testing.assert_array_equal(picture(points, "points", (-3.0, 3.0)), plot)
    np.testing.assert_array_equal(picture(bits, "bits", (0.0, 1.0)), bit_rows(bits))
    with pytest.raises(ValueError, match="kind='music'"):
        picture(bits, "music")
    with pytest.raises(ValueError, match="only images"):
        picture(points, "points", labels=list("abcdefghi"))


def frames_of(path):
    with Image.open(path) as gif:
        for number in range(gif.n_frames):
            gif.seek(number)
            yield np.asarray(gif.convert("RGB")), gif.info["duration"], gif.info.get("loop")


@pytest.mark.parametrize("channels", [1, 3])
def test_a_trajectory_plays_all_frames_and_rests_on_the_last(tmp_path, channels):
    # Few colours, so that the palette of a frame holds them all.
    values = np.random.default_rng(0).integers(0, 4, (7, 10, 12, channels), dtype=np.uint8) * 80
    path = trajectory_gif(tmp_path / "a" / "t.gif", list(values), frame_ms=50, hold_ms=900)
    frames = list(frames_of(path))
    assert [duration for _, duration, _ in frames] == [50] * 6 + [900]
    assert frames[0][2] == 0  # for ever
    for (shown, _, _), value in zip(frames, values, strict=True):
        np.testing.assert_array_equal(shown, np.broadcast_to(value, (10, 12, 3)))


def test_long_trajectories_are_thinned_out_evenly_with_both_ends(tmp_path):
    values = [np.full((4, 4, 1), level, np.uint8) for level in range(201)]
    shown = [int(f[0, 0, 0]) for f, _, _ in frames_of(trajectory_gif(tmp_path / "t.gif", values))]
    assert len(shown) == 60
    assert (shown[0], shown[-1]) == (0, 200)
    assert set(np.diff(shown)) == {3, 4}


def test_a_trajectory_needs_a_frame(tmp_path):
    with pytest.raises(ValueError, match="frames is empty"):
        trajectory_gif(tmp_path / "t.gif", [])
    assert list(tmp_path.iterdir()) == []
