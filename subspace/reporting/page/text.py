"""The room that text takes in a chart: estimated from above, for what draws it is another machine with other fonts."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from subspace.common.tables import printable_line

#: Widths in em of ASCII in DejaVu Sans, the widest of the usual fonts without serifs; the rest of it is ``_USUAL``.
_NARROW, _WIDE, _CAPITAL, _USUAL = 0.42, 1.0, 0.79, 0.65
#: How much wider a strong text is than a plain one.
_STRONG = 1.14
#: Of letters of other scripts, of signs that fill a square, and of pictures.
_LETTER, _SQUARE, _PICTURE = 1.0, 1.1, 1.4
_NARROW_ONES, _WIDE_ONES = frozenset("fijlrtIJ.,:;'|!()[]/\\` -"), frozenset("mwMW%@&#<=>+^~±×−≥≤→")
#: Symbols of this project's own, and letters that fonts have: as wide as they are counted.
_KNOWN = frozenset("±×−…≥≤→↑↓◆◇▽·")
#: Height of a line and its part above the baseline, in em.
LINE, ASCENT = 1.2, 0.95


class Box(NamedTuple):
    """A rectangle on a chart, in pixels from its upper left corner."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box, gap: float = 0.0) -> bool:
        """Return whether the two come nearer than ``gap``."""
        return (
            self.left < other.right + gap
            and other.left < self.right + gap
            and self.top < other.bottom + gap
            and other.top < self.bottom + gap
        )

    def inside(self, other: Box) -> bool:
        """Return whether the other one holds it."""
        return (
            self.left >= other.left
            and self.right <= other.right
            and self.top >= other.top
            and self.bottom <= other.bottom
        )


def text_width(text: str, size: float, *, strong: bool = False) -> float:
    """Return an upper estimate of a text's width in pixels, at a font's size in pixels."""
    return size * (_STRONG if strong else 1.0) * sum(map(_character, text))


def _character(character: str) -> float:
    if character in _NARROW_ONES:
        return _NARROW
    if character in _WIDE_ONES:
        return _WIDE
    if character.isascii() or character in _KNOWN:
        return _CAPITAL if character.isupper() else _USUAL
    if unicodedata.combining(character):
        return 0.0
    square = unicodedata.east_asian_width(character) in "WF"
    width = _PICTURE if not character.isalpha() else _SQUARE if square else _LETTER
    # One sign of Unicode may be a whole sentence; in full it has as many characters as it shows.
    return width * len(unicodedata.normalize("NFKC", character))


def is_measured(text: str) -> bool:
    """Return whether a text has only letters and what is known; pictures are to be fitted into their estimate."""
    return all(c.isascii() or c.isalpha() or c in _KNOWN or unicodedata.combining(c) for c in text)


def fitted(text: str, size: float, room: float, *, strong: bool = False) -> str:
    """Return a text as one line, cut with an ellipsis where it is wider than the room."""
    line = printable_line(text)
    if text_width(line, size, strong=strong) <= room:
        return line
    kept, width = "", text_width("…", size, strong=strong)
    for character in line:
        width += text_width(character, size, strong=strong)
        if width > room:
            break
        kept += character
    return f"{kept.rstrip()}…"


def text_box(x: float, y: float, text: str, size: float, anchor: str = "start", *, strong: bool = False) -> Box:
    """Return where a text stands whose baseline begins, has its middle, or ends at ``(x, y)``."""
    width = text_width(text, size, strong=strong)
    left = x - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
    return Box(left, y - ASCENT * size, left + width, y + (LINE - ASCENT) * size)


class Placed(NamedTuple):
    """A label beside a point: its baseline, anchor and box, and whether it is so far off that a line leads there."""

    x: float
    y: float
    anchor: str
    box: Box
    far: bool


#: Directions in which a label is tried, to the right first: anchor, across and down.
_DIRECTIONS = (
    ("start", 1.0, 0.0), ("end", -1.0, 0.0), ("middle", 0.0, -1.0), ("middle", 0.0, 1.0),
    ("start", -0.6, 1.0), ("start", -0.6, -1.0), ("end", 0.6, 1.0), ("end", 0.6, -1.0),
    ("start", 0.75, -0.75), ("start", 0.75, 0.75), ("end", -0.75, -0.75), ("end", -0.75, 0.75),
)  # fmt: skip
#: Distances from the point in pixels.
_DISTANCES = (8, 16, 26, 38, 52)


def place_labels(
    labels: Sequence[tuple[float, float, str, bool]], size: float, frame: Box, taken: Sequence[Box] = ()
) -> list[Placed | None]:
    """Return places for labels beside their points ``(x, y, text, strong)``; None for one that has no room.

    The first ones choose first: what matters most is to come first. No label touches another, a box that is ``taken``,
    or leaves the frame.
    """
    boxes = list(taken)
    found: list[Placed | None] = []
    for x, y, text, strong in labels:
        placed = next((p for p in _candidates(x, y, text, size, strong) if _free(p, (x, y), frame, boxes)), None)
        if placed:
            boxes += [placed.box, *_leader((x, y), placed)]
        found.append(placed)
    return found


def _candidates(x: float, y: float, text: str, size: float, strong: bool) -> list[Placed]:
    places = []
    for distance in _DISTANCES:
        for anchor, across, down in _DIRECTIONS:
            at_x = x + across * distance
            # The middle of the letters, not the baseline, is what stands at the height of the point.
            at_y = y + 0.35 * size + down * (distance + 0.3 * size)
            box = text_box(at_x, at_y, text, size, anchor, strong=strong)
            places.append(Placed(at_x, at_y, anchor, box, distance > _DISTANCES[0]))
    return places


def _free(placed: Placed, point: tuple[float, float], frame: Box, boxes: Sequence[Box]) -> bool:
    if not placed.box.inside(frame) or any(placed.box.meets(other, 1.0) for other in boxes):
        return False
    return not any(part.meets(other) for part in _leader(point, placed) for other in boxes)


def _leader(point: tuple[float, float], placed: Placed) -> list[Box]:
    """Return the line to a label that stands far off, as small boxes from beyond the point's mark on."""
    if not placed.far:
        return []
    (x, y), (to_x, to_y) = point, nearest(placed.box, *point)
    length = max(abs(to_x - x), abs(to_y - y), 1.0)
    shares = [share / 8 for share in range(9) if share / 8 * length > 8]
    at = [(x + share * (to_x - x), y + share * (to_y - y)) for share in shares]
    return [Box(a - 0.5, b - 0.5, a + 0.5, b + 0.5) for a, b in at]


def nearest(box: Box, x: float, y: float) -> tuple[float, float]:
    """Return where a line from a point ends at a label."""
    return min(max(x, box.left), box.right), min(max(y, box.top + 2), box.bottom - 2)
