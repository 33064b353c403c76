"""Tables rendered for the terminal, Markdown or LaTeX; pages of them are made by :mod:`subspace.reporting.page`.

JSON and CSV are written from the unrounded numbers.

Titles and names may come from anybody's files. Each is one line here without characters that command a terminal, and
every form writes it such that it is read as the text that it is.
"""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import rich.table

FORMATS = ("terminal", "markdown", "latex", "csv", "json", "html")
BEST, TIED = "◆", "◇"
#: Columns of a terminal for which tables are made at least.
NARROWEST = 40

_FORMULA = ("=", "+", "-", "@")  # what a spreadsheet takes for the beginning of one
_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "±": "$\\pm$",
    "×": "$\\times$",
    "≥": "$\\geq$",
    "<": "\\textless{}",
    ">": "\\textgreater{}",
    "|": "\\textbar{}",
    "↑": "$\\uparrow$",
    "↓": "$\\downarrow$",
    "▽": "$\\bigtriangledown$",
}
_MARKDOWN = {
    **{character: f"\\{character}" for character in "\\`*|~$#"},
    "&": "&amp;",
    "<": "&lt;",
    ">": "&gt;",
}


@dataclass(frozen=True)
class Grid:
    """A table of formatted cells: the first ``left`` columns are text, others numbers.

    Of its rows, the ``last`` ones before the ``facts`` at the end are set apart, and so are these. Where the cells are
    ``marked``, they are Markdown of this project's own.
    """

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    left: int = 1
    last: int = 0
    facts: int = 0
    marked: bool = False

    def __post_init__(self) -> None:
        """Make every text one line."""
        lines = {
            "title": printable_line(self.title),
            "head": tuple(map(printable_line, self.head)),
            "rows": tuple(tuple(map(printable_line, row)) for row in self.rows),
            "notes": tuple(map(printable_line, self.notes)),
        }
        for name, value in lines.items():
            object.__setattr__(self, name, value)

    @property
    def blocks(self) -> list[tuple[tuple[str, ...], ...]]:
        """The main rows, and those that are set apart."""
        end = len(self.rows) - self.facts
        cut = end - self.last
        return [block for block in (self.rows[:cut], self.rows[cut:end], self.rows[end:]) if block]

    def transposed(self) -> Grid:
        """Return the table with its rows as columns."""
        head, *rows = zip(self.head, *self.rows, strict=True)
        return Grid(self.title, head, tuple(rows), self.notes)

    def markdown(self) -> str:
        """Return the table in Markdown, its notes below."""
        rule = [":---"] * self.left + ["---:"] * (len(self.head) - self.left)
        written = (lambda text: text.replace("|", "\\|")) if self.marked else _markdown
        head, *rows = [[written(text) for text in row] for row in (self.head, *self.rows)]
        lines = [f"| {' | '.join(row)} |" for row in (head, rule, *rows)]
        title = [f"**{_markdown(self.title)}**", ""] if self.title else []
        return "\n".join([*title, *lines, "", *(f"- {_markdown(note)}" for note in self.notes)]).rstrip()

    def latex(self) -> str:
        """Return the table for LaTeX with the package booktabs; the best value is bold, its ties underlined."""
        columns = "l" * self.left + "r" * (len(self.head) - self.left)
        blocks = ["\n".join(f"{' & '.join(map(_latex_cell, row))} \\\\" for row in block) for block in self.blocks]
        head = f"{' & '.join(map(_latex, self.head))} \\\\"
        body = "\n\\midrule\n".join([head, *blocks])
        notes = "\n".join(f"% {note.replace(BEST, 'bold').replace(TIED, 'underlined')}" for note in self.notes)
        begin = f"% {self.title}\n\\begin{{tabular}}{{{columns}}}\n\\toprule"
        return f"{begin}\n{body}\n\\bottomrule\n\\end{{tabular}}\n{notes}"

    def rich(self, *, wrapped: bool = False) -> rich.table.Table:
        """Return the table for a terminal; its cells are lines, or wrapped if the terminal is narrow."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        # As Text, because rich interprets brackets in plain strings as markup.
        table = Table(
            title=Text(self.title) if self.title else None,
            title_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
        )
        table.caption = Text("\n".join(self.notes)) if self.notes else None
        table.caption_justify = "left"
        for number, name in enumerate(self.head):
            table.add_column(
                Text(name),
                justify="left" if number < self.left else "right",
                no_wrap=not wrapped,
                overflow="fold",
            )
        for block in self.blocks:
            for row in block:
                table.add_row(*(Text(text, style="bold" if BEST in text else "") for text in row))
            table.add_section()
        return table


def render_grids(grids: Sequence[Grid], form: str) -> str:
    """Return tables as text, in Markdown or LaTeX."""
    return "\n\n".join(grid.markdown() if form == "markdown" else grid.latex() for grid in grids)


def csv_text(rows: Sequence[Mapping[str, Any]], last: Sequence[str] = ()) -> str:
    """Return rows as CSV with a head, a column for every name that one of them has; those of ``last`` come last."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    names = [*(name for name in names if name not in last), *(name for name in names if name in last)]
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: _no_formula(value) if isinstance(value, str) else value for key, value in row.items()})
    return out.getvalue()


def _no_formula(text: str) -> str:
    """Return a text in one line that a spreadsheet takes for a text."""
    line = printable_line(text)
    return f"'{line}" if line.lstrip().startswith(_FORMULA) else line


def print_grid(grid: Grid, *, wrapped: bool = False) -> None:
    """Print a table on standard output, within the terminal's width; a table of texts may be ``wrapped`` to it.

    A wider table of numbers becomes several, each with the first columns. What is no terminal has no width.
    """
    from rich.console import Console

    screen = _screen_width()
    for part in [grid] if wrapped or screen is None else _parts(grid, screen):
        narrow = wrapped or (screen is not None and _width(part) > screen)
        table = part.rich(wrapped=narrow)
        widest = Console(width=10_000).measure(table).maximum
        Console(width=min(widest, screen or 140) if narrow else widest).print(table)


def _screen_width() -> int | None:
    """Return the width of the terminal that standard output is, or that COLUMNS claims; None for a pipe or a file."""
    width = shutil.get_terminal_size((0, 0)).columns if sys.stdout.isatty() or "COLUMNS" in os.environ else 0
    return max(width, NARROWEST) if width else None


def _parts(grid: Grid, screen: int) -> list[Grid]:
    """Return a table as several that are no wider than the screen, as far as one column of numbers allows it."""
    if _width(grid) <= screen or len(grid.head) <= grid.left + 1:
        return [grid]
    first = tuple(range(grid.left))
    chosen: list[tuple[int, ...]] = [()]
    for column in range(grid.left, len(grid.head)):
        if chosen[-1] and _width(_only(grid, (*first, *chosen[-1], column))) > screen:
            chosen.append(())
        chosen[-1] = (*chosen[-1], column)
    parts = [_only(grid, (*first, *columns)) for columns in chosen]
    return [
        replace(part, title=grid.title if part is parts[0] else "", notes=grid.notes if part is parts[-1] else ())
        for part in parts
    ]


def _only(grid: Grid, columns: Sequence[int]) -> Grid:
    """Return a table's columns by their numbers."""
    rows = tuple(tuple(row[column] for column in columns) for row in grid.rows)
    return replace(grid, head=tuple(grid.head[column] for column in columns), rows=rows)


def _width(grid: Grid) -> int:
    """Return the columns that a table takes in a terminal: a space at each side of a cell, and one between two."""
    from rich.cells import cell_len

    lines = (grid.head, *grid.rows)
    return sum(max(cell_len(row[column]) for row in lines) + 3 for column in range(len(grid.head))) - 1


def printable_line(text: str) -> str:
    """Return a text as one line, without characters that command a terminal or turn the direction of writing."""
    if text.isprintable():
        return text
    kept = "".join(" " if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") else c for c in text)
    return " ".join(kept.split())


def _markdown(text: str) -> str:
    """Return a text that Markdown shows as it is: no HTML, no link, no emphasis."""
    escaped = "".join(_MARKDOWN.get(character, character) for character in text)
    # Brackets and underscores stand in intervals and in names, where they mean nothing; elsewhere they would.
    escaped = re.sub(r"\](?=[(\[:])", r"\\]", escaped)
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", escaped)


def _latex(text: str) -> str:
    plain = "".join(_LATEX.get(character, character) for character in text).replace("--", "-{}-")
    # After the end of a row LaTeX takes these for an argument.
    return f"{{}}{plain}" if plain.startswith(("[", "*")) else plain


def _latex_cell(text: str) -> str:
    plain = _latex(re.sub(f" ?[{BEST}{TIED}]$", "", text))
    return f"\\textbf{{{plain}}}" if BEST in text else f"\\underline{{{plain}}}" if TIED in text else plain
