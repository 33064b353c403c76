"""Plots of result tables: one panel a task, one marker a method, with its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from subspace.common.files import write_file
from subspace.common.tables import printable_line
from subspace.errors import UserError, nearest
from subspace.reporting.statistics import ALPHA
from subspace.reporting.tables import Row, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KINDS = (".png", ".svg", ".pdf")
PANELS_ACROSS = 5
BEST, TIED, WORSE = "#0b6e4f", "#5aa9e6", "#8d8d8d"  # the marker's shape distinguishes them in greyscale


def plot(tables: Sequence[Table], file: Path) -> list[Path]:
    """Draw each table into a file, and return the files: ``file``, or with several tables its name plus the protocol.

    Raises:
        UserError: the suffix of ``file`` is not one of ``KINDS``.
    """
    if file.suffix not in KINDS:
        raise UserError(
            f"a plot was to be drawn as {file}, but is one of: {', '.join(KINDS)}. {nearest(file.suffix, KINDS)}"
        )
    files = [file if len(tables) == 1 else file.with_stem(f"{file.stem}-{table.protocol}") for table in tables]
    for table, target in zip(tables, files, strict=True):
        _draw(table, target)
    return files


def _draw(table: Table, file: Path) -> None:
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [*(row for row in table.rows if row.in_mean), *table.means] or list(table.rows)
    across = min(PANELS_ACROSS, len(rows))
    down = math.ceil(len(rows) / across)
    height = 0.9 + 0.28 * len(table.columns)
    # The same scores give the same file, and a dollar sign in a name is one.
    with rc_context({"svg.hashsalt": "subspace", "text.parse_math": False}):
        figure = Figure(figsize=(1.6 + 2.4 * across, 0.7 + height * down), layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(f"{table.protocol}: accuracy in %, 95 % interval", fontsize=11)
        panels = figure.subplots(down, across, squeeze=False, sharey=True).ravel()
        for panel, row in zip(panels, rows, strict=False):
            _panel(panel, row)
        for panel in panels[len(rows) :]:
            panel.set_visible(False)
        names = [printable_line(column.name) for column in table.columns]
        panels[0].set_yticks(range(len(names)), names)
        panels[0].set_ylim(len(names) - 0.5, -0.5)
        note = "dotted: always the most frequent answer"
        if len(names) > 1:
            tied = f"not significantly different from it (p ≥ {ALPHA} after Holm)"
            note = f"diamond: best; circle: {tied}; cross: worse; {note}"
        figure.supxlabel(note, fontsize=8, color="#555555")
        form, metadata = file.suffix.removeprefix("."), {"Date": None} if file.suffix == ".svg" else None
        write_file(file, lambda path: figure.savefig(path, format=form, dpi=160, metadata=metadata))


def _panel(panel: Axes, row: Row) -> None:
    panel.set_title(printable_line(row.title), fontsize=9)
    panel.axvline(100 * row.majority, color="#bbbbbb", linestyle=":", linewidth=1)
    for number, cell in enumerate(row.cells):
        if cell is None:
            continue
        tied = cell.p is None or cell.p >= ALPHA
        color, shape = (BEST, "D") if cell.best else (TIED, "o") if tied else (WORSE, "X")
        error = [[100 * (cell.value - cell.low)], [100 * (cell.high - cell.value)]]
        panel.errorbar(
            100 * cell.value, number, xerr=error, fmt=shape, color=color, markersize=5, capsize=2, linewidth=1.2
        )
    panel.tick_params(labelsize=8)
    panel.tick_params(axis="y", length=0)
    panel.grid(axis="x", color="#eeeeee")
    panel.set_axisbelow(True)
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)
