"""A page: its parts, and the one HTML file that they become. Every text is escaped where it is put in."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from subspace.common.foreign.templates import page_template
from subspace.common.tables import BEST, Grid, printable_line
from subspace.reporting.page.figure import Figure

_FOLDER = Path(__file__).parent
#: Widths in pixels for which a chart can be drawn: a phone, a page of paper or a small screen, a wide one.
NARROW, MEDIUM, WIDE = 344.0, 728.0, 1080.0


class Key(NamedTuple):
    """An entry of a legend: a mark's shape and class, and what it stands for."""

    shape: str
    kind: str
    text: str


@dataclass(frozen=True)
class Panel:
    """A chart with its caption and its numbers.

    Attributes:
        title: its heading.
        note: how it is read.
        figures: one for each of some widths, of which a screen shows the one that fits; or many ``small`` ones.
        data: the numbers as a table.
        legend: what marks stand for.
        small: whether the figures are parts that all are shown.
        across: how many panels stand side by side where the screen is wide.
    """

    title: str
    note: str
    figures: tuple[Figure, ...]
    data: Grid
    legend: tuple[Key, ...] = ()
    small: bool = False
    across: int = 1


class Finding(NamedTuple):
    """A sentence that stands out, with a heading."""

    title: str
    text: str


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading: sentences, charts, tables, those shown when asked for, and remarks."""

    id: str
    title: str
    lead: str = ""
    findings: tuple[Finding, ...] = ()
    panels: tuple[Panel, ...] = ()
    grids: tuple[Grid, ...] = ()
    folded: tuple[Grid, ...] = ()
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Page:
    """A page of results."""

    title: str
    lead: str
    sections: tuple[Section, ...]
    facts: tuple[tuple[str, str], ...] = ()


def render(page: Page) -> str:
    """Return the page as HTML: one file with its style and its charts in it, which reaches for nothing outside."""
    text: str = _template().render(page=page, style=_style(), best=BEST, line=printable_line)
    return text


@cache
def _template() -> Any:
    return page_template((_FOLDER / "page.html").read_text(encoding="utf-8"), key=key_svg, variant=variant)


@cache
def _style() -> str:
    return (_FOLDER / "style.css").read_text(encoding="utf-8")


def key_svg(key: Key) -> Figure:
    """Return the mark of a legend's entry."""
    figure = Figure("", "", 18, 14)
    figure.mark(9, 7, key.shape, key.kind, "", 4)
    return figure


def variant(panel: Panel, figure: Figure) -> str:
    """Return the class by which the style shows a figure on some widths of screens only; empty where there is one."""
    if panel.small or len(panel.figures) == 1:
        return ""
    names = {2: ("narrow medium", "wide"), 3: ("narrow", "medium", "wide")}[len(panel.figures)]
    return names[sorted(other.width for other in panel.figures).index(figure.width)]
