"""A chart as a list of SVG elements, and the scales and ticks of its axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from subspace.reporting.page.text import fitted, is_measured, text_width

#: Sizes of text in pixels; style.css has the same.
SIZE, SMALL = 11.0, 10.0


class Element(NamedTuple):
    """An SVG element: attributes, the text in it, and a title that is shown where a pointer rests on it."""

    tag: str
    attributes: dict[str, Any]
    text: str = ""
    title: str = ""


@dataclass
class Figure:
    """A chart of so many pixels. ``title`` and ``summary`` are read out in its place."""

    title: str
    summary: str
    width: float
    height: float
    elements: list[Element] = field(default_factory=list)

    def line(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        """Draw a line through points."""
        path = " ".join(f"{_n(x)},{_n(y)}" for x, y in points)
        self.elements.append(Element("polyline", {"class": kind, "points": path}))

    def box(self, x: float, y: float, width: float, height: float, kind: str) -> None:
        """Draw a rectangle."""
        place = {"x": _n(x), "y": _n(y), "width": _n(width), "height": _n(height)}
        self.elements.append(Element("rect", {"class": kind, **place}))

    def mark(self, x: float, y: float, shape: str, kind: str, title: str, size: float = 4.0) -> None:
        """Draw the mark of a number."""
        path = SHAPES[shape](x, y, size)
        self.elements.append(Element("path", {"class": f"mark {kind}", "d": path, "data-mark": shape}, "", title))

    def mark_chosen(self, x: float, y: float, kind: str, edge: str | None) -> None:
        """Draw a ring around a mark; at an end of its axis, an arrow that points beyond it as well."""
        ring = {"class": f"ring {kind}", "cx": _n(x), "cy": _n(y), "r": "7", "data-chosen": edge or "inside"}
        self.elements.append(Element("circle", ring))
        if edge:
            side = 1 if edge == "high" else -1
            path = SHAPES["right" if side > 0 else "left"](x + side * 11, y, 3.5)
            self.elements.append(Element("path", {"class": f"arrow {kind}", "d": path}))

    def write(
        self, x: float, y: float, text: str, *, kind: str = "", anchor: str = "start", room: float = math.inf
    ) -> None:
        """Write a text, cut where it is wider than its room. What is cut is read in full where a pointer rests."""
        size = SMALL if "small" in kind.split() else SIZE
        strong = not {"strong", "heading"}.isdisjoint(kind.split())
        shown = fitted(text, size, room, strong=strong)
        attributes: dict[str, Any] = {"x": _n(x), "y": _n(y), "class": f"text {kind}".strip(), "text-anchor": anchor}
        if not is_measured(shown):
            attributes |= {"textLength": _n(text_width(shown, size)), "lengthAdjust": "spacing"}
        self.elements.append(Element("text", attributes, shown, "" if shown == text else text))


def _n(value: float) -> str:
    """Return a coordinate to a tenth of a pixel."""
    return f"{value:.1f}".removesuffix(".0")


# The shapes of marks, which tell them apart without colour.


def _circle(x: float, y: float, s: float) -> str:
    return f"M{_n(x - s)} {_n(y)}a{_n(s)} {_n(s)} 0 1 0 {_n(2 * s)} 0a{_n(s)} {_n(s)} 0 1 0 {_n(-2 * s)} 0z"


def _polygon(*corners: tuple[float, float]) -> Callable[[float, float, float], str]:
    def path(x: float, y: float, s: float) -> str:
        return "M" + "L".join(f"{_n(x + a * s)} {_n(y + b * s)}" for a, b in corners) + "z"

    return path


def _cross(*arms: tuple[float, float]) -> Callable[[float, float, float], str]:
    def path(x: float, y: float, s: float) -> str:
        return "".join(f"M{_n(x - a * s)} {_n(y - b * s)}L{_n(x + a * s)} {_n(y + b * s)}" for a, b in arms)

    return path


SHAPES: dict[str, Callable[[float, float, float], str]] = {
    "circle": _circle,
    "square": _polygon((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    "diamond": _polygon((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
    "up": _polygon((0, -1.2), (1.2, 0.9), (-1.2, 0.9)),
    "down": _polygon((0, 1.2), (1.2, -0.9), (-1.2, -0.9)),
    "left": _polygon((-1.2, 0), (0.9, -1.2), (0.9, 1.2)),
    "right": _polygon((1.2, 0), (-0.9, -1.2), (-0.9, 1.2)),
    "cross": _cross((1, 1), (1, -1)),
    "plus": _cross((1.2, 0), (0, 1.2)),
    "star": _cross((1.2, 0), (0.6, 1.04), (-0.6, 1.04)),
}


# Axes.


@dataclass(frozen=True)
class Scale:
    """What turns a number into a place: from ``low`` at pixel ``start`` to ``high`` at pixel ``end``."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the pixel of a number; one beyond the ends of the axis is drawn at its end."""
        value = min(max(value, self.low), self.high)
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def linear(values: Sequence[float], start: float, end: float, margin: float = 0.05) -> Scale:
    """Return an axis that holds these numbers, with a margin beyond them."""
    low, high = min(values), max(values)
    room = margin * (high - low) or abs(low) * 0.05 or 1.0
    return Scale(low - room, high + room, start, end)


def logarithmic(values: Sequence[float], start: float, end: float, margin: float = 0.06) -> Scale:
    """Return a logarithmic axis that holds these numbers above 0."""
    low, high = min(values), max(values)
    room = (high / low) ** margin if high > low else 2.0
    return Scale(low / room, high * room, start, end, log=True)


def ticks(scale: Scale, most: int) -> list[float]:
    """Return at most so many round numbers on an axis, but at least one."""
    return _log_ticks(scale, most) if scale.log else _linear_ticks(scale.low, scale.high, most)


def _linear_ticks(low: float, high: float, most: int) -> list[float]:
    finer = step = 10.0 ** math.floor(math.log10((high - low) / 100))
    while True:
        for factor in (1, 2, 5):
            width = factor * step
            first, last = math.ceil(low / width - 1e-9), math.floor(high / width + 1e-9)
            if last - first + 1 <= most:
                if last > first:
                    return [number * width for number in range(first, last + 1)]
                return _ends(low, high, finer) or [(low + high) / 2]
            finer = width
        step *= 10


def _ends(low: float, high: float, width: float) -> list[float]:
    """Return the first and the last multiple on an axis, where round numbers would be too many or only one."""
    first, last = math.ceil(low / width - 1e-9), math.floor(high / width + 1e-9)
    return [first * width, last * width] if last > first else []


def _log_ticks(scale: Scale, most: int) -> list[float]:
    first, last = math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high))
    for leading in ((1, 2, 5), (1, 3), (1,)):
        found = [
            value
            for power in range(first, last + 1)
            for factor in leading
            if scale.low <= (value := factor * 10.0**power) <= scale.high
        ]
        if len(found) <= most:
            break
    while len(found) > most:
        found = found[:: -(-len(found) // most)]
    if len(found) >= 2:
        return found
    return _linear_ticks(scale.low, scale.high, most)


# Numbers in words.


def plain_number(value: float) -> str:
    """Return a number as an axis has it: ``0.35``, ``1200``."""
    return f"{value:.10g}" if abs(value) < 1e-12 or 1e-3 <= abs(value) < 1e5 else f"{value:.2g}"


def rate_number(value: float) -> str:
    """Return a learning rate: ``3.2e-4``."""
    mantissa, _, power = f"{value:.1e}".partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(power)}"


def large_number(value: float) -> str:
    """Return a large number with its unit of thousands: ``1.66M``."""
    for power, unit in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 0.9995 * 10**power:
            return f"{value / 10**power:.3g}{unit}"
    return f"{value:.3g}"
