"""Marks around the texts of a row, by which they are found again in what a chat template makes of them.

A template may trim a text, write it into JSON, move it, leave it out or write it twice. So a row is rendered twice: as
it is, and with its texts marked. If both agree but for the marks, the marks say where each text stands; if not, the
template did something else because of the marks, and nothing is known.

A mark is letters of a script that nobody writes. They are letters, not control characters or private ones, because
templates trim, print and escape those.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

# Linear A, Anatolian hieroglyphs, Egyptian hieroglyphs, cuneiform, Bamum: the first with no letter in the row is taken.
_SCRIPTS = (0x10600, 0x14400, 0x13000, 0x12000, 0x16800)
_LETTERS = 12  # opening, closing, and ten digits


class Segment(NamedTuple):
    """A piece of the rendered text: of the part with this number of the row, or of the template if None."""

    text: str
    part: int | None = None


@dataclass(frozen=True)
class Part:
    """A text of a row that should be in the rendered text.

    Attributes:
        turn: the number of its turn from 0; -1 for a declaration of a tool.
        kind: ``content``, ``reasoning``, ``call`` (the name of a called tool), ``arguments``, ``tool`` (the name of a
            declared tool), ``description``, or another key of a turn.
        text: without the white space around it.
        leaf: a number that is the same for all parts of one text.
        lead: what stands before it in that text, from the part before on, and is not marked.
        trail: what stands behind the last part of that text.
    """

    turn: int
    kind: str
    text: str
    leaf: int
    lead: str = ""
    trail: str = ""


class Marks:
    """A set of marks of which no letter is in the texts of a row."""

    def __init__(self, texts: Iterable[str]) -> None:
        joined = "\0".join(texts)
        free = (base for base in _SCRIPTS if not any(chr(base + i) in joined for i in range(_LETTERS)))
        base = next(free, None)
        self.usable = base is not None
        base = _SCRIPTS[0] if base is None else base
        self._open, self._close = chr(base), chr(base + 1)
        self._digits = [chr(base + 2 + i) for i in range(10)]
        number = f"([{self._digits[0]}-{self._digits[9]}]+)"
        self._any = re.compile(f"{self._open}{number}{self._open}|{self._close}{number}{self._close}")

    def around(self, number: int, text: str) -> str:
        """Return a text with marks inside of the white space around it, which many templates trim."""
        core = text.strip()
        if not core:
            return text
        start = text.index(core)
        written = "".join(self._digits[int(digit)] for digit in str(number))
        opening, closing = (f"{letter}{written}{letter}" for letter in (self._open, self._close))
        return f"{text[:start]}{opening}{core}{closing}{text[start + len(core) :]}"

    def split(self, text: str) -> list[Segment] | None:
        """Return the pieces of a rendered text, without the marks; None if a mark lacks its other half."""
        segments, at, inside = [], 0, None
        for mark in self._any.finditer(text):
            opened, closed = (self._number(found) for found in mark.groups())
            if inside != closed:
                return None
            if mark.start() > at or inside is not None:
                segments.append(Segment(text[at : mark.start()], inside))
            inside, at = opened, mark.end()
        if inside is not None:
            return None
        if at < len(text):
            segments.append(Segment(text[at:]))
        return segments

    def after(self, text: str) -> tuple[int | None, str]:
        """Return the number of the last marked part of a rendered text, and what follows it."""
        last, at = None, 0
        for mark in self._any.finditer(text):
            last, at = self._number(mark.group(1) or mark.group(2)), mark.end()
        return last, text[at:]

    def _number(self, written: str | None) -> int | None:
        if written is None:
            return None
        return int("".join(str(self._digits.index(letter)) for letter in written))
