"""The kinds of charts: dots with intervals, curves, clouds of points with their front, and two orders side by side.

Each number is one mark, in a shape that tells it from others without its colour. Beyond the top of an axis stand ``up``
(too large for it) and ``cross`` (not finite: a training that failed).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from subspace.reporting.page.figure import (
    SIZE,
    SMALL,
    Figure,
    Scale,
    linear,
    logarithmic,
    plain_number,
    ticks,
)
from subspace.reporting.page.text import Box, fitted, nearest, place_labels, text_box, text_width

#: Shapes of the methods that a chart of several tells apart; style.css has a colour for each.
STYLES = ("circle", "square", "diamond", "down", "plus", "star")
ROW, BOTTOM, TOP, EDGE = 20.0, 36.0, 26.0, 6.0


@dataclass(frozen=True)
class Axis:
    """An axis: what it shows, the numbers that it must hold, and how they are written."""

    label: str
    values: tuple[float, ...]
    log: bool = False
    name: Callable[[float], str] = plain_number

    def scale(self, start: float, end: float) -> Scale:
        """Return the axis between two pixels."""
        return (logarithmic if self.log else linear)(self.values, start, end)


class Dot(NamedTuple):
    """A row of a dot plot. ``kind`` is ``best``, ``better``, ``same``, ``worse`` or ``reference``."""

    label: str
    value: float | None
    low: float
    high: float
    kind: str = "same"
    note: str = ""
    told: str = ""


#: Pixels of a letter's column, and the most columns.
LETTER, LETTERS = 11.0, 8
DOT_SHAPES = {"best": "diamond", "better": "diamond", "same": "circle", "worse": "down", "reference": "square"}


def dots(
    title: str,
    summary: str,
    rows: Sequence[Dot],
    axis: str,
    width: float,
    *,
    zero: float | None = None,
    name: Callable[[float], str] = plain_number,
) -> Figure:
    """Return a row for each number with its interval; ``zero`` is what they are compared with.

    An interval without an end reaches the end of the axis.
    """
    height = EDGE + ROW * len(rows) + BOTTOM
    figure = Figure(title, summary, width, height)
    left = EDGE + 8 + min(0.4 * width, max(text_width(row.label, SIZE) for row in rows))
    letters = sorted({letter for row in rows for letter in row.note})
    right = width - EDGE - (8 + LETTER * min(len(letters), LETTERS) if letters else 0)
    known = [v for row in rows for v in (row.value, row.low, row.high) if v is not None and math.isfinite(v)]
    scale = Axis(axis, tuple([*known, *([] if zero is None else [zero])] or [0.0]), name=name).scale(left, right)
    foot = EDGE + ROW * len(rows)
    for number in range(1, len(rows), 2):
        figure.box(0, EDGE + ROW * number, width, ROW, "stripe")
    _across(figure, scale, Axis(axis, (), name=name), EDGE, foot)
    if zero is not None:
        figure.line([(scale(zero), EDGE), (scale(zero), foot)], "zero")
    for number, row in enumerate(rows):
        y = EDGE + ROW * (number + 0.5)
        figure.write(left - 8, y + 0.35 * SIZE, row.label, anchor="end", room=left - 8 - EDGE)
        _note(figure, row.note, letters, right + 8, y + 0.35 * SMALL)
        if row.value is not None:
            if row.low < row.high:
                figure.line([(scale(row.low), y), (scale(row.high), y)], f"interval {row.kind}")
            figure.mark(scale(row.value), y, DOT_SHAPES[row.kind], row.kind, f"{row.label}: {row.told}")
    return figure


def _note(figure: Figure, note: str, letters: Sequence[str], x: float, y: float) -> None:
    """Write letters of groups, each in a column of its own where there are few, so that groups are seen as columns."""
    if len(letters) > LETTERS:
        figure.write(x, y, note, kind="small", room=LETTER * LETTERS)
        return
    for letter in note:
        figure.write(x + LETTER * (letters.index(letter) + 0.5), y, letter, kind="small", anchor="middle")


@dataclass(frozen=True)
class Curve:
    """A line with its numbers.

    Attributes:
        label: its method's, or another name.
        points: ``(x, y)`` in the order of x.
        style: its place among ``STYLES``; None for one of many that stay in the background.
        chosen: the number of its marked point.
        edge: the end of the ladder at which that lies: ``low`` or ``high``.
        kind: a further class, as ``faint``.
    """

    label: str
    points: tuple[tuple[float, float], ...]
    style: int | None = None
    chosen: int | None = None
    edge: str | None = None
    kind: str = ""


def curves(
    title: str,
    summary: str,
    drawn: Sequence[Curve],
    x: Axis,
    y: Axis,
    size: tuple[float, float],
    *,
    heading: str = "",
    level: float | None = None,
) -> Figure:
    """Return lines over an axis; those of the background first.

    With a ``heading`` it is one of many small ones, whose axes are named once beside them. ``level`` is a number that
    all are compared with.
    """
    width, height = size
    figure = Figure(title, summary, width, height)
    foot = height - (20 if heading else BOTTOM)
    down = y.scale(foot, TOP)
    most = max(2, int((foot - TOP) / 28))
    names = [(value, y.name(value)) for value in ticks(down, most)]
    left = EDGE + 6 + max(text_width(name, SMALL) for _, name in names)
    across = x.scale(left, width - EDGE - 4)
    figure.write(EDGE, 12, heading or y.label, kind="heading" if heading else "axis", room=width - 2 * EDGE)
    for value, name in names:
        figure.line([(left, down(value)), (width - EDGE, down(value))], "rule")
        figure.write(left - 6, down(value) + 0.35 * SMALL, name, kind="small", anchor="end")
    _across(figure, across, x, TOP, foot, named=not heading)
    if level is not None:
        figure.line([(left, down(level)), (width - EDGE, down(level))], "level")
    for curve in sorted(drawn, key=lambda curve: curve.style is not None):
        _curve(figure, curve, across, down, x, y)
    return figure


def _curve(figure: Figure, curve: Curve, across: Scale, down: Scale, x: Axis, y: Axis) -> None:
    kind = ("muted" if curve.style is None else f"c{curve.style}") + (f" {curve.kind}" if curve.kind else "")
    places = [(across(at), down(value) if math.isfinite(value) else down(down.high)) for at, value in curve.points]
    if len(places) > 1:
        figure.line(places, f"curve {kind}")
    for number, ((at, value), (px, py)) in enumerate(zip(curve.points, places, strict=True)):
        shape = "circle" if curve.style is None else STYLES[curve.style]
        shape = "cross" if not math.isfinite(value) else "up" if value > down.high else shape
        size = 2.0 if curve.style is None or curve.kind == "faint" else 3.5
        told = f"{y.name(value)}" if math.isfinite(value) else "failed"
        figure.mark(px, py, shape, kind, f"{curve.label}: {told} at {x.name(at)}", size)
        if number == curve.chosen:
            figure.mark_chosen(px, py, kind, curve.edge)


def _across(figure: Figure, scale: Scale, axis: Axis, top: float, foot: float, *, named: bool = True) -> None:
    """Draw the axis at the foot: a rule at each tick, its numbers where they have room, and what it shows."""
    figure.line([(scale.start, foot), (scale.end, foot)], "base")
    most = max(2, int((scale.end - scale.start) / 46))
    end = -math.inf
    for value in ticks(scale, most):
        place, name = scale(value), axis.name(value)
        figure.line([(place, top), (place, foot)], "rule")
        box = text_box(place, 0, name, SMALL, "middle")
        if box.left > end + 4 and box.right <= figure.width:
            figure.write(place, foot + 14, name, kind="small", anchor="middle")
            end = box.right
    if named:
        figure.write(
            figure.width - EDGE, foot + 30, axis.label, kind="axis", anchor="end", room=figure.width - 2 * EDGE
        )


class Point(NamedTuple):
    """A method in a cloud: what it costs, how good it is with its interval, and how surely it is on the front."""

    label: str
    x: float
    y: float
    low: float
    high: float
    front: bool
    share: float | None
    told: str = ""

    @property
    def name(self) -> str:
        """Its label, with the share of draws in which it is on the front."""
        return self.label if self.share is None else f"{self.label} {100 * self.share:.0f} %"


@dataclass(frozen=True)
class Cloud:
    """A chart of score against cost; ``lower`` says that a lower score is better, so that up is better in any case."""

    title: str
    summary: str
    points: tuple[Point, ...]
    x: Axis
    y: Axis
    lower: bool = False


def cloud(chart: Cloud, size: tuple[float, float]) -> Figure:
    """Return points, those on the front joined by a staircase and labelled first."""
    width, height = size
    figure = Figure(chart.title, chart.summary, width, height)
    foot = height - BOTTOM
    ends = (TOP + 4, foot - 4) if chart.lower else (foot - 4, TOP + 4)
    down = chart.y.scale(*ends)
    names = [(value, chart.y.name(value)) for value in ticks(down, max(2, int((foot - TOP) / 30)))]
    left = EDGE + 6 + max(text_width(name, SMALL) for _, name in names)
    across = chart.x.scale(left + 4, width - EDGE - 4)
    figure.write(EDGE, 12, chart.y.label, kind="axis", room=width - 2 * EDGE)
    for value, name in names:
        figure.line([(left, down(value)), (width - EDGE, down(value))], "rule")
        figure.write(left - 6, down(value) + 0.35 * SMALL, name, kind="small", anchor="end")
    _across(figure, across, chart.x, TOP, foot)
    front = sorted((point for point in chart.points if point.front), key=lambda point: (point.x, point.y))
    stairs = _staircase([(across(p.x), down(p.y)) for p in front], across.end)
    if stairs:
        figure.line(stairs, "staircase")
    for point in sorted(chart.points, key=lambda point: point.front):
        shape, kind, dot = ("diamond", "front", 4.0) if point.front else ("circle", "behind", 3.5)
        figure.mark(across(point.x), down(point.y), shape, kind, f"{point.label}: {point.told}", dot)
    lines = [_around_both(one, other) for one, other in itertools.pairwise(stairs)]
    _label(figure, chart.points, across, down, Box(left + 2, TOP, width - EDGE, foot - 2), lines)
    return figure


def _staircase(corners: Sequence[tuple[float, float]], end: float) -> list[tuple[float, float]]:
    """Return the line that joins the front: what is right of it and below is worse than something that was found."""
    path: list[tuple[float, float]] = []
    for x, y in corners:
        if path:
            path.append((x, path[-1][1]))
        path.append((x, y))
    return [*path, (end, path[-1][1])] if path else []


def _label(
    figure: Figure, points: Iterable[Point], across: Scale, down: Scale, frame: Box, lines: Sequence[Box]
) -> None:
    """Write labels where there is room: the front's first, then by how often a point is on it."""
    order = sorted(points, key=lambda point: (not point.front, -(point.share or 0), point.label))
    marks = [_around(across(point.x), down(point.y), 5) for point in order]
    wanted = [(across(p.x), down(p.y), fitted(_name(p), SMALL, 110, strong=p.front), p.front) for p in order]
    for point, (x, y, text, _), placed in zip(
        order, wanted, place_labels(wanted, SMALL, frame, [*marks, *lines]), strict=True
    ):
        if placed:
            if placed.far:
                figure.line([(x, y), nearest(placed.box, x, y)], "leader")
            figure.write(
                placed.x, placed.y, text, kind="small" + (" strong" if point.front else ""), anchor=placed.anchor
            )


def _name(point: Point) -> str:
    return point.name if point.front or (point.share or 0) >= 0.05 else point.label


def _around_both(one: tuple[float, float], other: tuple[float, float]) -> Box:
    (a, b), (c, d) = one, other
    return Box(min(a, c) - 1, min(b, d) - 1, max(a, c) + 1, max(b, d) + 1)


def _around(x: float, y: float, size: float) -> Box:
    return Box(x - size, y - size, x + size, y + size)


class Standing(NamedTuple):
    """A method's places in two orders, from 1."""

    label: str
    before: int
    after: int


def orders(title: str, summary: str, heads: tuple[str, str], rows: Sequence[Standing], width: float) -> Figure:
    """Return two orders side by side, each method's places joined; what moved by a quarter of them stands out."""
    row = 17.0
    figure = Figure(title, summary, width, 28 + row * len(rows) + EDGE)
    room = width * 0.36
    left, right = EDGE + room, width - EDGE - room
    figure.write(left, 14, heads[0], kind="axis", anchor="end", room=room)
    figure.write(right, 14, heads[1], kind="axis", room=room)

    def height(place: int) -> float:
        return 28 + row * (place - 0.5)

    for standing in sorted(rows, key=lambda found: abs(found.before - found.after)):
        moved = standing.before - standing.after
        kind = "muted" if abs(moved) < max(2, len(rows) / 4) else "better" if moved > 0 else "worse"
        start, end = (left + 12, height(standing.before)), (right - 12, height(standing.after))
        figure.line([start, end], f"curve {kind}")
        told = f"{standing.label}: {heads[0]} {standing.before}, {heads[1]} {standing.after}"
        strong = "" if kind == "muted" else " strong"
        for (x, y), place, anchor, out in ((start, standing.before, "end", -8), (end, standing.after, "start", 8)):
            shape = "circle" if kind == "muted" else "up" if moved > 0 else "down"
            figure.mark(x, y, shape, kind, told, 3)
            text = f"{standing.label} {place}" if anchor == "end" else f"{place} {standing.label}"
            figure.write(x + out, y + 0.35 * SMALL, text, kind=f"small{strong}", anchor=anchor, room=room)
    return figure
