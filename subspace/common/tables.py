"""Tables rendered for the terminal, Markdown, LaTeX or HTML. JSON and CSV are written from the unrounded numbers."""

from __future__ import annotations

import html
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import rich.table

FORMATS = ("terminal", "markdown", "latex", "csv", "json", "html")
BEST, TIED = "◆", "◇"

_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "±": "$\\pm$",
    "×": "$\\times$",
    "≥": "$\\geq$",
}
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em; color: #1c1c1c }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
caption { text-align: left; font-weight: 600; padding: .5em 0 }
th, td { padding: .25em .8em; text-align: right; white-space: nowrap }
thead { border-bottom: 1.5px solid }
tbody + tbody { border-top: 1px solid }
.left { text-align: left }
.best { font-weight: 700 }
ul { color: #555; padding-left: 1.2em }
"""


@dataclass(frozen=True)
class Grid:
    """A table of formatted cells: the first ``left`` columns are text, others numbers; ``last`` rows are set apart."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    left: int = 1
    last: int = 0

    @property
    def blocks(self) -> list[tuple[tuple[str, ...], ...]]:
        """The main rows, and the last ones that are set apart."""
        cut = len(self.rows) - self.last
        return [block for block in (self.rows[:cut], self.rows[cut:]) if block]

    def transposed(self) -> Grid:
        """Return the table with its rows as columns."""
        head, *rows = zip(self.head, *self.rows, strict=True)
        return Grid(self.title, head, tuple(rows), self.notes)

    def markdown(self) -> str:
        """Return the table in Markdown, its notes below."""
        rule = [":---"] * self.left + ["---:"] * (len(self.head) - self.left)
        cells = [[text.replace("|", "\\|") for text in row] for row in (self.head, rule, *self.rows)]
        lines = [f"| {' | '.join(row)} |" for row in cells]
        title = [f"**{self.title}**", ""] if self.title else []
        return "\n".join([*title, *lines, "", *(f"- {note}" for note in self.notes)]).rstrip()

    def latex(self) -> str:
        """Return the table for LaTeX with the package booktabs; the best value is bold, its ties underlined."""
        columns = "l" * self.left + "r" * (len(self.head) - self.left)
        blocks = ["\n".join(f"{' & '.join(map(_latex_cell, row))} \\\\" for row in block) for block in self.blocks]
        head = f"{' & '.join(map(_latex, self.head))} \\\\"
        body = "\n\\midrule\n".join([head, *blocks])
        notes = "\n".join(f"% {note.replace(BEST, 'bold').replace(TIED, 'underlined')}" for note in self.notes)
        begin = f"% {self.title}\n\\begin{{tabular}}{{{columns}}}\n\\toprule"
        return f"{begin}\n{body}\n\\bottomrule\n\\end{{tabular}}\n{notes}"

    def html(self) -> str:
        """Return the table as HTML, its notes below."""

        def line(row: Sequence[str], tag: str) -> str:
            kinds = ["left" if i < self.left else "best" if BEST in text else "" for i, text in enumerate(row)]
            cells = (
                f"<{tag}{f' class={kind}' if kind else ''}>{html.escape(text)}</{tag}>"
                for kind, text in zip(kinds, row, strict=True)
            )
            return f"<tr>{''.join(cells)}</tr>"

        bodies = ["\n".join(["<tbody>", *(line(row, "td") for row in block), "</tbody>"]) for block in self.blocks]
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes)
        head = f"<caption>{html.escape(self.title)}</caption>\n<thead>{line(self.head, 'th')}</thead>"
        return "\n".join(["<table>", head, *bodies, "</table>", f"<ul>{notes}</ul>"])

    def rich(self, *, wrapped: bool = False) -> rich.table.Table:
        """Return the table for a terminal; its cells are lines, or wrapped if the terminal is narrow."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        # As Text, because rich interprets brackets in plain strings as markup.
        table = Table(
            title=Text(self.title) if self.title else None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
        )
        table.caption = Text("\n".join(self.notes)) if self.notes else None
        table.caption_justify = "left"
        for number, name in enumerate(self.head):
            table.add_column(
                Text(name), justify="left" if number < self.left else "right", no_wrap=not wrapped, overflow="fold"
            )
        for block in self.blocks:
            for row in block:
                table.add_row(*(Text(text, style="bold" if BEST in text else "") for text in row))
            table.add_section()
        return table


def html_page(grids: Sequence[Grid]) -> str:
    """Return a web page of these tables."""
    tables = "\n".join(grid.html() for grid in grids)
    head = f'<meta charset="utf-8"><title>{html.escape(grids[0].title)}</title><style>{_STYLE}</style>'
    return f"<!doctype html>\n<html lang=en><head>{head}</head>\n<body>\n{tables}\n</body></html>"


def render_grids(grids: Sequence[Grid], form: str) -> str:
    """Return tables as text, in Markdown, LaTeX or HTML."""
    if form == "html":
        return html_page(grids)
    return "\n\n".join(grid.markdown() if form == "markdown" else grid.latex() for grid in grids)


def print_grid(grid: Grid, *, wrapped: bool = False) -> None:
    """Print a table on standard output; a table of texts may be ``wrapped`` to the terminal's width."""
    from rich.console import Console

    table = grid.rich(wrapped=wrapped)
    widest = Console(width=10_000).measure(table).maximum
    Console(width=min(widest, max(shutil.get_terminal_size((140, 0)).columns, 100)) if wrapped else widest).print(table)


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def _latex_cell(text: str) -> str:
    plain = _latex(re.sub(f" ?[{BEST}{TIED}]$", "", text))
    return f"\\textbf{{{plain}}}" if BEST in text else f"\\underline{{{plain}}}" if TIED in text else plain
