"""The picture of `solver_errors.py`: many curves on logarithmic axes, each with its name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FINE, WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 3, 450, 600, 52, 300, 40, 50
GRID, BAND, TEXT, GAP = (228, 228, 228), (222, 222, 222), (60, 60, 60), 15.0


class Line(NamedTuple):
    """A curve of the picture, with the names of its methods."""

    names: list[str]
    colour: tuple[int, int, int]
    points: list[tuple[float, float]]

    def rows(self, most: int = 42) -> list[str]:
        """The names in rows of at most so many characters."""
        rows = [self.names[0]]
        for name in self.names[1:]:
            if len(rows[-1]) + len(name) + 2 > most:
                rows[-1] += ","
                rows.append(name)
            else:
                rows[-1] += f", {name}"
        return rows


class Axes:
    """Logarithmic axes of a panel: evaluations and errors to pixels."""

    def __init__(self, budgets: Sequence[int], lines: Sequence[Line]) -> None:
        self.budgets = budgets
        errors = [e for line in lines for _, e in line.points]
        self.low, self.high = np.log10(min(errors)) - 0.1, np.log10(max(errors)) + 0.1

    @property
    def decades(self) -> range:
        """Exponents of the powers of ten inside."""
        return range(int(np.ceil(self.low)), int(np.floor(self.high)) + 1)

    def x(self, evaluations: float) -> float:
        low, high = np.log2(self.budgets[0]), np.log2(self.budgets[-1])
        return (np.log2(evaluations) - low) / (high - low) * WIDTH

    def y(self, error: float) -> float:
        return (self.high - np.log10(error)) / (self.high - self.low) * HEIGHT


def panel(
    title: str,
    budgets: Sequence[int],
    lines: Sequence[Line],
    alone: Line | None = None,
    band: Sequence[float] = (),
) -> Image.Image:
    """One pair of axes, every line with its name beside its end, one that ends within with its
    name beside its start, and a grey band between two errors."""
    axes = Axes(budgets, [*lines, *([alone] if alone else [])])
    area = Image.new("RGB", (WIDTH * FINE, HEIGHT * FINE), "white")
    fine = ImageDraw.Draw(area)
    if band:
        fine.rectangle((0, FINE * axes.y(max(band)), area.width, FINE * axes.y(min(band))), BAND)
    for row in (axes.y(10.0**decade) * FINE for decade in axes.decades):
        fine.line((0, row, area.width, row), GRID, FINE)
    for column in (axes.x(budget) * FINE for budget in budgets):
        fine.line((column, 0, column, area.height), GRID, FINE)
    for line in [*lines, *([alone] if alone else [])]:
        points = [(FINE * axes.x(b), FINE * axes.y(e)) for b, e in line.points]
        fine.line(points, line.colour, 2 * FINE, joint="curve")
        for x, y in points:
            fine.ellipse((x - 7, y - 7, x + 7, y + 7), line.colour)
    picture = Image.new("RGB", (LEFT + WIDTH + RIGHT, TOP + HEIGHT + BOTTOM), "white")
    picture.paste(area.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS), (LEFT, TOP))
    draw = ImageDraw.Draw(picture)
    write_axes(draw, title, axes)
    name_lines(draw, lines, axes)
    if alone:
        place = (LEFT + axes.x(alone.points[0][0]) + 8, TOP + axes.y(alone.points[0][1]))
        draw.text(place, alone.names[0], alone.colour, ImageFont.load_default(12), anchor="lm")
    return picture


def write_axes(draw: ImageDraw.ImageDraw, title: str, axes: Axes) -> None:
    """Frame, ticks and title."""
    small = ImageFont.load_default(12)
    draw.rectangle((LEFT - 1, TOP - 1, LEFT + WIDTH, TOP + HEIGHT), outline=(150, 150, 150))
    for decade in axes.decades:
        text = f"1e{decade}" if decade else "1"
        draw.text((LEFT - 6, TOP + axes.y(10.0**decade)), text, TEXT, small, anchor="rm")
    for budget in axes.budgets:
        draw.text((LEFT + axes.x(budget), TOP + HEIGHT + 4), str(budget), TEXT, small, anchor="ma")
    centre = LEFT + WIDTH / 2
    draw.text((centre, TOP + HEIGHT + 26), "network evaluations", TEXT, small, anchor="ma")
    draw.text((centre, 12), title, (0, 0, 0), ImageFont.load_default(14), anchor="ma")


def name_lines(draw: ImageDraw.ImageDraw, lines: Sequence[Line], axes: Axes) -> None:
    """The names in the order of the ends, apart from one another, each led to its line."""
    font, side = ImageFont.load_default(12), LEFT + WIDTH
    ordered = sorted(lines, key=lambda line: axes.y(line.points[-1][1]))
    heights = [GAP * len(line.rows()) for line in ordered]
    tops = [TOP + axes.y(line.points[-1][1]) - 0.5 * GAP for line in ordered]
    for k in range(1, len(tops)):
        tops[k] = max(tops[k], tops[k - 1] + heights[k - 1])
    limit = TOP + HEIGHT + BOTTOM - 4.0
    for k in reversed(range(len(tops))):
        limit = tops[k] = min(tops[k], limit - heights[k])
    for line, top in zip(ordered, tops, strict=True):
        y = TOP + axes.y(line.points[-1][1])
        draw.line((side + 2, y, side + 5, y, side + 24, top + 0.5 * GAP), line.colour, 1)
        for number, text in enumerate(line.rows()):
            place = (side + 28, top + (number + 0.5) * GAP)
            draw.text(place, text, line.colour, font, anchor="lm")


def save(panels: Sequence[Image.Image], path: Path) -> None:
    """From left to right, in few colours."""
    whole = Image.fromarray(np.concatenate([np.asarray(p) for p in panels], axis=1))
    whole.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
