"""Plots by their pixels: where a line is, how high a bar stands, what the ticks say."""

from __future__ import annotations

import numpy as np
import pytest

from diffusion_jax.visual import Bars, Curve, Panel, curve_plot
from diffusion_jax.visual.curves import _BARS, _BOTTOM, _COLOURS, _LEFT, _RIGHT, _TOP, _Axis

WIDTH, HEIGHT = 200, 100


def area_of(panel: Panel) -> np.ndarray:
    """The pixels between the axes."""
    picture = curve_plot([panel], size=(WIDTH, HEIGHT))
    assert picture.shape == (_TOP + HEIGHT + _BOTTOM, _LEFT + WIDTH + _RIGHT, 3)
    return picture[_TOP : _TOP + HEIGHT, _LEFT : _LEFT + WIDTH].astype(int)


def rows_of(area: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Middle row of a colour in each column; NaN where there is none."""
    found = np.abs(area - np.array(colour)).max(axis=2) < 30
    weight = found.sum(axis=0)
    rows = (found * np.arange(len(area))[:, None]).sum(axis=0)
    return np.where(weight > 0, rows / np.maximum(weight, 1), np.nan)


def test_a_line_runs_where_its_values_are():
    """y = x on equal axes from 0 to 1: from the lower left to the upper right, with 4% of room."""
    x = np.linspace(0.0, 1.0, 50)
    rows = rows_of(area_of(Panel(title="", x_label="", curves=(Curve(x=x, y=x),))), _COLOURS[0])
    expected = HEIGHT * (1.0 - (np.arange(WIDTH) + 0.5) / WIDTH / 1.04)
    inside = slice(5, -5)
    assert np.isfinite(rows[inside]).all()
    np.testing.assert_allclose(rows[inside], expected[inside], atol=1.5)


def test_curves_have_their_own_colours_and_gaps_where_they_have_no_value():
    x = np.linspace(0.0, 1.0, 201)
    gap = np.where((x > 0.4) & (x < 0.6), np.nan, 1.0)
    area = area_of(
        Panel(title="", x_label="", curves=(Curve(x=x, y=gap), Curve(x=x, y=np.full(201, 2.0))))
    )
    first, second = (rows_of(area, colour) for colour in _COLOURS[:2])
    assert np.isnan(first[90:110]).all()
    assert np.isfinite(first[5:75]).all()
    assert np.isfinite(second[5:-5]).all()
    assert np.nanmean(second) < np.nanmean(first)


def test_an_exponential_is_straight_on_a_logarithmic_axis():
    x = np.linspace(0.0, 5.0, 100)
    panel = Panel(title="", x_label="", curves=(Curve(x=x, y=10.0**-x),), log=True)
    rows = rows_of(area_of(panel), _COLOURS[0])
    seen = np.isfinite(rows)
    assert seen.mean() > 0.9
    straight = HEIGHT * (np.arange(WIDTH) + 0.5) / WIDTH
    np.testing.assert_allclose(rows[seen], straight[seen], atol=1.5)


def test_bars_stand_as_high_as_they_are():
    bars = Bars(edges=np.array([0.0, 1.0, 2.0, 3.0]), heights=np.array([1.0, 0.5, 0.25]))
    area = area_of(Panel(title="", x_label="", bars=bars))
    filled = (np.abs(area - np.array(_BARS)).max(axis=2) < 12).sum(axis=0)
    third = WIDTH // 3
    heights = [filled[third * k + 10 : third * (k + 1) - 10].mean() for k in range(3)]
    np.testing.assert_allclose(heights, np.array([1.0, 0.5, 0.25]) / 1.04 * HEIGHT, atol=2.0)


def test_ticks_are_round_and_at_their_values():
    assert _Axis(-0.1, 1.04).ticks() == [
        (pytest.approx((0.2 * k + 0.1) / 1.14), text)
        for k, text in enumerate(("0", "0.2", "0.4", "0.6", "0.8", "1"))
    ]
    assert [text for _, text in _Axis(-13.0, 13.0).ticks()] == ["-10", "-5", "0", "5", "10"]
    logarithmic = _Axis(-4.0, 2.0, log=True)
    assert [text for _, text in logarithmic.ticks()][:4] == ["1e-4", "0.001", "0.01", "0.1"]
    assert logarithmic.place(np.array([1e-4, 1e-1, 1e2])) == pytest.approx([0.0, 0.5, 1.0])


def test_a_logarithmic_axis_of_few_decades_has_ticks_between_them():
    few = _Axis(np.log10(3.0), np.log10(60.0), log=True)
    assert [text for _, text in few.ticks()] == ["5", "10", "20", "50"]
    places = few.place(np.array([5.0, 10.0, 20.0, 50.0]))
    assert [place for place, _ in few.ticks()] == pytest.approx(places)
    narrow = _Axis(np.log10(3.1), np.log10(3.9), log=True)
    assert [text for _, text in narrow.ticks()] == ["3.2", "3.4", "3.6", "3.8"]


def test_points_are_marked_and_error_bars_reach_as_far_as_they_are():
    curve = Curve(x=np.array([1.0, 10.0]), y=np.array([1.0, 2.0]), errors=np.array([0.5, 0.0]))
    area = area_of(Panel(title="", x_label="", curves=(curve,), x_log=True))
    found = np.abs(area - np.array(_COLOURS[0])).max(axis=2) < 60
    # 0.04 of the width on both sides; from 0 to 2 and 4% on the vertical axis.
    columns = [round(WIDTH * (0.04 + 1.0 * k) / 1.08) for k in (0, 1)]
    high, low = (HEIGHT * (1.0 - value / 2.08) for value in (1.5, 0.5))
    rows = np.flatnonzero(found[:, columns[0] - 1 : columns[0] + 1].any(axis=1))
    assert rows.min() == pytest.approx(high, abs=2.0)
    assert rows.max() == pytest.approx(low, abs=2.0)
    # The mark of the second point is wider than the line, and has no bar.
    rows = np.flatnonzero(found[:, columns[1]])
    assert 5 <= len(rows) <= 9
    # An error bar that reaches below 0 goes to the edge of a logarithmic axis.
    deep = Curve(x=curve.x, y=np.array([1.0, 20.0]), errors=np.array([3.0, 0.1]))
    area = area_of(Panel(title="", x_label="", curves=(deep,), log=True, x_log=True))
    found = np.abs(area - np.array(_COLOURS[0])).max(axis=2) < 60
    assert found[-1, columns[0] - 1 : columns[0] + 1].any()


def test_a_legend_too_wide_for_one_line_has_more():
    x = np.arange(3.0)
    curves = [Curve(x=x, y=x + k, label=f"a label of some length {k}") for k in range(6)]
    one = curve_plot([Panel(title="t", x_label="", curves=curves[:1])], size=(WIDTH, HEIGHT))
    all_ = curve_plot([Panel(title="t", x_label="", curves=curves)], size=(WIDTH, HEIGHT))
    assert all_.shape[0] > one.shape[0] + 4 * 10
    assert all_.shape[1] == one.shape[1]
    for colour in _COLOURS[:6]:
        found = (all_[: len(all_) - HEIGHT - _BOTTOM] == np.array(colour)).all(axis=2)
        assert found.any()
    # Panels beside each other end at one height.
    panels = [Panel(title="t", x_label="", curves=c) for c in (curves, curves[:1])]
    assert len(curve_plot(panels, size=(WIDTH, HEIGHT))) == len(all_)


def test_panels_stand_side_by_side_with_their_words():
    panel = Panel(title="a title", x_label="t", curves=(Curve(x=np.arange(3.0), y=np.ones(3)),))
    one, two = curve_plot([panel]), curve_plot([panel, panel])
    np.testing.assert_array_equal(two, np.concatenate([one, one], axis=1))
    bare = curve_plot([Panel(title="", x_label="t", curves=panel.curves)])
    assert (one[:30] != 255).any()
    assert (bare[:30] == 255).all()


@pytest.mark.parametrize("values", [np.full(3, np.nan), np.zeros(0)])
def test_nothing_to_draw_is_an_error(values):
    curve = Curve(x=np.arange(float(len(values))), y=values)
    with pytest.raises(ValueError, match="'empty' has no value"):
        curve_plot([Panel(title="empty", x_label="", curves=(curve,))])
    with pytest.raises(ValueError, match="panels is empty"):
        curve_plot([])
