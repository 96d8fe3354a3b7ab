"""Curves and histograms with axes, panel beside panel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

_COLOURS = (
    (25, 60, 130),
    (205, 85, 25),
    (55, 135, 60),
    (130, 60, 140),
    (0, 140, 160),
    (180, 40, 60),
    (140, 110, 20),
    (110, 110, 110),
)
_BARS = (178, 196, 226)
_FRAME, _GRID, _TEXT = (150, 150, 150), (232, 232, 232), (70, 70, 70)
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 18, 62, 44
# Lines are drawn this much larger and reduced, which smooths them.
_FINE = 3
_LEGEND = 15
"""Height of a line of the legend."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A line through points; it is broken where a value is not finite.

    Attributes:
      x, y: [n] coordinates, x in any order.
      label: for the legend; "" for none.
      errors: [n], half the length of the error bar of each point, which is then marked; None for
        a line alone.
    """

    x: Float[np.ndarray, " n"]
    y: Float[np.ndarray, " n"]
    label: str = ""
    errors: Float[np.ndarray, " n"] | None = None


@dataclass(frozen=True, kw_only=True)
class Bars:
    """A histogram.

    Attributes:
      edges: [n + 1], rising.
      heights: [n], from 0 upwards.
      label: for the legend; "" for none.
    """

    edges: Float[np.ndarray, " edges"]
    heights: Float[np.ndarray, " bars"]
    label: str = ""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes.

    Attributes:
      title: above everything.
      x_label: below the axis.
      curves: lines, in the order of their colours.
      bars: a histogram behind them.
      x_range: ends of the horizontal axis; None: those of the data.
      log: whether the vertical axis is logarithmic; values that are not positive are left out.
      x_log: the same of the horizontal axis.
    """

    title: str
    x_label: str
    curves: Sequence[Curve] = ()
    bars: Bars | None = None
    x_range: tuple[float, float] | None = None
    log: bool = False
    x_log: bool = False


def curve_plot(
    panels: Sequence[Panel], *, size: tuple[int, int] = (360, 270)
) -> UInt8[np.ndarray, "height width 3"]:
    """Draw panels from left to right.

    Args:
      panels: at least one.
      size: (width, height) of the area of each plot in pixels, without its labels.

    Raises:
      ValueError: no panels, or a panel without a value that could be drawn.
    """
    if len(panels) == 0:
        raise ValueError("panels is empty; expected at least one")
    legends = max(len(_legend(panel, size[0])) for panel in panels)
    return np.concatenate([_draw(panel, *size, legends) for panel in panels], axis=1)


class _Axis:
    """Values to places between 0 and 1."""

    def __init__(self, low: float, high: float, log: bool = False) -> None:
        self.low, self.high, self.log = low, high, log

    def place(self, values: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            values = np.log10(values) if self.log else values
        return (values - self.low) / (self.high - self.low)

    def ticks(self) -> list[tuple[float, str]]:
        """(place, text) of round values along the axis."""
        if self.log:
            first, last = math.ceil(self.low - 1e-9), math.floor(self.high + 1e-9)
            if last - first < 2:
                return self._between_decades()
            every = max(1, math.ceil((last - first) / 6))
            return [(self._at(float(k)), _power(k)) for k in range(first, last + 1, every)]
        step = _round_step((self.high - self.low) / 6.0)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [(self._at(k * step), f"{k * step:.10g}") for k in range(first, last + 1)]

    def _between_decades(self) -> list[tuple[float, str]]:
        """Ticks of a logarithmic axis of few decades: 1, 2 and 5 times a power of ten, or all."""
        decades = range(math.floor(self.low) - 1, math.ceil(self.high) + 1)
        for multiples in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
            values = [m * 10.0**k for k in decades for m in multiples]
            shown = [v for v in values if self.low - 1e-9 <= math.log10(v) <= self.high + 1e-9]
            if len(shown) >= 3:
                return [(self._at(math.log10(v)), f"{v:.4g}") for v in shown]
        linear = _Axis(10.0**self.low, 10.0**self.high).ticks()
        values = [float(text) for _, text in linear]
        return [(self._at(math.log10(v)), f"{v:.10g}") for v in values if v > 0.0]

    def _at(self, value: float) -> float:
        return (value - self.low) / (self.high - self.low)


def _power(exponent: int) -> str:
    return f"{10.0**exponent:g}" if -3 <= exponent <= 4 else f"1e{exponent}"


def _round_step(least: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is at least `least`."""
    unit = 10.0 ** math.floor(math.log10(least))
    return next(m * unit for m in (1.0, 2.0, 5.0, 10.0) if m * unit >= least * (1.0 - 1e-9))


def _axes(panel: Panel) -> tuple[_Axis, _Axis]:
    """The horizontal and the vertical axis that hold all that is drawn."""
    xs = [curve.x for curve in panel.curves] + ([panel.bars.edges] if panel.bars else [])
    ys = [end for curve in panel.curves for end in _ends(curve)]
    ys += [panel.bars.heights] if panel.bars else []
    y = np.concatenate([np.asarray(v, np.float64) for v in ys]) if ys else np.zeros(0)
    y = y[np.isfinite(y) & ((y > 0.0) | (not panel.log))]
    if not len(y):
        raise ValueError(f"panel {panel.title!r} has no value to draw")
    x = np.concatenate([np.asarray(v, np.float64) for v in xs])
    x_axis = _x_axis(panel, x[np.isfinite(x) & ((x > 0.0) | (not panel.x_log))])
    if panel.log:
        bottom, top = math.log10(y.min()), math.log10(y.max())
        bottom, top = _apart(bottom, top)
        room = 0.04 * (top - bottom) if top - bottom < 3.0 else 0.0
        return x_axis, _Axis(bottom - room, top + room, log=True)
    bottom, top = float(y.min()), float(y.max())
    if panel.bars or 0.0 <= bottom < 0.5 * top:
        bottom = min(bottom, 0.0)
    bottom, top = _apart(bottom, top)
    room = 0.04 * (top - bottom)
    return x_axis, _Axis(bottom - (room if bottom != 0.0 else 0.0), top + room)


def _ends(curve: Curve) -> list[np.ndarray]:
    """Values, and the ends of their error bars."""
    y = np.asarray(curve.y, np.float64)
    return [y] if curve.errors is None else [y, y - curve.errors, y + curve.errors]


def _x_axis(panel: Panel, x: np.ndarray) -> _Axis:
    if panel.x_range is not None:
        return _Axis(*panel.x_range)
    marked = any(curve.errors is not None for curve in panel.curves)
    x = np.log10(x) if panel.x_log else x
    low, high = _apart(float(x.min()), float(x.max()))
    # Marks at the ends are seen whole.
    room = 0.04 * (high - low) if marked else 0.0
    return _Axis(low - room, high + room, log=panel.x_log)


def _apart(low: float, high: float) -> tuple[float, float]:
    """The ends of a stretch that is not empty."""
    if high - low > 1e-9 * max(abs(low), abs(high)):
        return low, high
    half = 0.5 * max(abs(low), 1.0)
    return low - half, high + half


def _draw(panel: Panel, width: int, height: int, legends: int) -> UInt8[np.ndarray, "h w 3"]:
    x_axis, y_axis = _axes(panel)
    area = Image.new("RGB", (width * _FINE, height * _FINE), "white")
    fine = ImageDraw.Draw(area)
    for place, _ in x_axis.ticks():
        fine.line((place * area.width, 0, place * area.width, area.height), _GRID, _FINE)
    for place, _ in y_axis.ticks():
        row = (1.0 - place) * area.height
        fine.line((0, row, area.width, row), _GRID, _FINE)
    if panel.bars is not None:
        _draw_bars(fine, panel.bars, x_axis, y_axis, area.size)
    for curve, colour in zip(panel.curves, _cycled(len(panel.curves)), strict=True):
        _draw_curve(fine, curve, x_axis, y_axis, area.size, colour)
    top = _TOP + _LEGEND * max(legends - 1, 0)
    picture = Image.new("RGB", (_LEFT + width + _RIGHT, top + height + _BOTTOM), "white")
    picture.paste(area.resize((width, height), Image.Resampling.LANCZOS), (_LEFT, top))
    _write(ImageDraw.Draw(picture), panel, x_axis, y_axis, width, (top, top + height))
    return np.asarray(picture)


def _cycled(count: int) -> list[tuple[int, int, int]]:
    return [_COLOURS[number % len(_COLOURS)] for number in range(count)]


def _draw_bars(
    draw: ImageDraw.ImageDraw, bars: Bars, x_axis: _Axis, y_axis: _Axis, size: tuple[int, int]
) -> None:
    columns = x_axis.place(np.asarray(bars.edges, np.float64)) * size[0]
    rows = (1.0 - y_axis.place(np.asarray(bars.heights, np.float64))) * size[1]
    ground = (1.0 - float(y_axis.place(np.zeros(1))[0])) * size[1] if not y_axis.log else size[1]
    for left, right, row in zip(columns[:-1], columns[1:], rows, strict=True):
        if np.isfinite(row) and row < ground:
            draw.rectangle((left, row, max(left, right - 1), ground), fill=_BARS)


def _draw_curve(
    draw: ImageDraw.ImageDraw,
    curve: Curve,
    x_axis: _Axis,
    y_axis: _Axis,
    size: tuple[int, int],
    colour: tuple[int, int, int],
) -> None:
    x = x_axis.place(np.asarray(curve.x, np.float64)) * size[0]
    y = (1.0 - y_axis.place(np.asarray(curve.y, np.float64))) * size[1]
    whole = np.isfinite(x) & np.isfinite(y)
    # What lies far outside is cut by the picture; Pillow wants its numbers small.
    points = np.clip(np.stack([x, y], axis=1), -1e4, 1e4)
    for run in np.split(np.arange(len(x)), np.flatnonzero(~whole)):
        run = run[whole[run]]
        if len(run):
            draw.line([tuple(p) for p in points[run].tolist()], colour, 2 * _FINE, joint="curve")
    if curve.errors is None:
        return
    # Beyond what the axis shows, such as below 0 on a logarithmic one, a bar goes on to the edge.
    ends = [y_axis.place(end) for end in _ends(curve)[1:]]
    low, high = (np.clip(np.nan_to_num(end, nan=-1.0), -1.0, 2.0) for end in ends)
    for column, row, bottom, top in zip(x, y, low, high, strict=True):
        if np.isfinite(column) and np.isfinite(row):
            ends = (column, (1.0 - top) * size[1], column, (1.0 - bottom) * size[1])
            draw.line(ends, colour, _FINE)
            draw.circle((column, row), 3.5 * _FINE, colour)


def _legend(panel: Panel, width: int) -> list[list[tuple[float, str, tuple[int, int, int]]]]:
    """Lines of (column, label, colour), broken where they would be wider than the plot."""
    font = ImageFont.load_default(11)
    entries = [(panel.bars.label, _BARS)] if panel.bars else []
    colours = _cycled(len(panel.curves))
    entries += [(c.label, colour) for c, colour in zip(panel.curves, colours, strict=True)]
    lines: list[list[tuple[float, str, tuple[int, int, int]]]] = []
    left = math.inf
    for label, colour in entries:
        if not label:
            continue
        wide = 17 + font.getlength(label)
        if left + wide > width + _RIGHT:
            lines.append([])
            left = 0.0
        lines[-1].append((left, label, colour))
        left += wide + 14
    return lines


def _write(
    draw: ImageDraw.ImageDraw,
    panel: Panel,
    x_axis: _Axis,
    y_axis: _Axis,
    width: int,
    rows: tuple[int, int],
) -> None:
    """Frame, ticks, title, axis and legend, around a plot between two `rows`."""
    right, (top, bottom) = _LEFT + width, rows
    draw.rectangle((_LEFT - 1, top - 1, right, bottom), outline=_FRAME)
    small, large = ImageFont.load_default(11), ImageFont.load_default(13)
    for place, text in x_axis.ticks():
        draw.text((_LEFT + place * width, bottom + 4), text, _TEXT, small, anchor="ma")
    for place, text in y_axis.ticks():
        draw.text((_LEFT - 6, bottom - place * (bottom - top)), text, _TEXT, small, anchor="rm")
    draw.text((_LEFT + width / 2, 10), panel.title, (0, 0, 0), large, anchor="ma")
    draw.text((_LEFT + width / 2, bottom + 22), panel.x_label, _TEXT, small, anchor="ma")
    lines = _legend(panel, width)
    for number, line in enumerate(lines):
        middle = top - 16 - _LEGEND * (len(lines) - 1 - number)
        for left, label, colour in line:
            draw.rectangle((_LEFT + left, middle - 5, _LEFT + left + 12, middle + 4), fill=colour)
            draw.text((_LEFT + left + 17, middle), label, _TEXT, small, anchor="lm")
