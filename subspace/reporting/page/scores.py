"""The pages of ``subspace table`` and ``subspace compare``: scores with intervals, and differences of methods."""

from __future__ import annotations

from collections.abc import Sequence

from subspace.common.tables import Grid
from subspace.reporting.comparison import Comparison
from subspace.reporting.page import charts
from subspace.reporting.page.charts import Dot
from subspace.reporting.page.document import MEDIUM, NARROW, WIDE, Key, Page, Panel, Section, render
from subspace.reporting.published import PublishedComparison
from subspace.reporting.statistics import ALPHA
from subspace.reporting.tables import Row, Table

_MARKS = (
    Key("diamond", "best", "best"),
    Key("circle", "same", f"not significantly different from it (p ≥ {ALPHA} after Holm)"),
    Key("down", "worse", "worse"),
)
_DIFFERENCES = (
    Key("diamond", "better", f"better (p < {ALPHA} after Holm)"),
    Key("circle", "same", "not told apart"),
    Key("down", "worse", "worse"),
)


def tables_page(tables: Sequence[Table], *, transposed: bool = False) -> str:
    """Return tables of scores as a page: the tables, and a chart for each task and mean."""
    sections = []
    for number, table in enumerate(tables, 1):
        grid = table.grid.transposed() if transposed else table.grid
        rows = [*table.means, *(row for row in table.rows if row.in_mean)] or list(table.rows)
        panels = tuple(_scores(table, row) for row in rows)
        sections.append(Section(f"table-{number}", f"{table.protocol}: table", grids=(grid,)))
        sections.append(Section(f"charts-{number}", f"{table.protocol}: each task", panels=panels))
    names = list(dict.fromkeys(column.name for table in tables for column in table.columns))
    lead = f"Accuracy in % with 95 % intervals: {', '.join(names)}."
    return render(Page("Scores", lead, tuple(sections)))


def _scores(table: Table, row: Row) -> Panel:
    rows = []
    for column, cell in zip(table.columns, row.cells, strict=True):
        if cell is None:
            rows.append(Dot(column.name, None, 0.0, 0.0, told="not scored"))
            continue
        kind = "best" if cell.best else "same" if cell.p is None or cell.p >= ALPHA else "worse"
        rows.append(Dot(column.name, 100 * cell.value, 100 * cell.low, 100 * cell.high, kind, "", str(cell)))
    metric = f", {row.metric}" if row.metric else ""
    best = [dot.label for dot in rows if dot.kind == "best" and dot.value is not None]
    summary = f"{row.title}: accuracy of {len(rows)} methods with intervals. Best: {', '.join(best) or 'the only one'}."
    texts = [(column.name, *_numbers(dot)) for column, dot in zip(table.columns, rows, strict=True)]
    several = len(table.columns) > 1
    return Panel(
        title=f"{row.title}{metric}",
        note=f"{row.n} items. Line: always the most frequent answer, {100 * row.majority:.1f} %.",
        figures=(charts.dots(row.title, summary, rows, "accuracy in %", NARROW, zero=100 * row.majority),),
        data=Grid("", ("method", "accuracy", "low", "high"), tuple(texts)),
        legend=tuple(key for key in _MARKS if several and any(dot.kind == key.kind for dot in rows)),
        across=3,
    )


def _numbers(dot: Dot) -> tuple[str, str, str]:
    if dot.value is None:
        return "-", "-", "-"
    return f"{dot.value:.2f}", f"{dot.low:.2f}", f"{dot.high:.2f}"


def comparisons_page(found: Sequence[Comparison], *, items: bool = False) -> str:
    """Return comparisons as a page: what is concluded, a chart and a table of each, and the items that flipped."""
    sections = tuple(_comparison(number, one, items=items) for number, one in enumerate(found, 1))
    names = ", ".join(dict.fromkeys(one.other.name for one in found))
    return render(Page("Comparison", f"{names} beside {found[0].first.name}, item by item.", sections))


def _comparison(number: int, one: Comparison, *, items: bool) -> Section:
    named = {line.task for line in one.tasks}
    rows = []
    for line in (*one.tasks, *(line for line in one.means if line.task not in named)):
        d = line.difference
        kind = "same" if line.corrected >= ALPHA else "better" if d.value > 0 else "worse"
        told = f"{100 * d.value:+.1f} [{100 * d.low:+.1f}, {100 * d.high:+.1f}], p (Holm) {line.corrected:.2g}"
        rows.append(Dot(line.title, 100 * d.value, 100 * d.low, 100 * d.high, kind, "", told))
    what = f"{one.other.name} minus {one.first.name}, in points"
    panel = Panel(
        title=what,
        note="Dot: difference of accuracy over the same items; bar: its 95 % interval, not corrected.",
        figures=tuple(
            charts.dots(what, one.verdict, rows, "points", width, zero=0.0) for width in (NARROW, MEDIUM, WIDE)
        ),
        data=Grid("", ("task", "difference", "low", "high"), tuple((dot.label, *_numbers(dot)) for dot in rows)),
        legend=tuple(key for key in _DIFFERENCES if any(dot.kind == key.kind for dot in rows)),
    )
    title = f"{one.protocol}: {one.other.name} and {one.first.name}"
    flips = (one.flipped,) if items else ()
    return Section(f"comparison-{number}", title, one.verdict, panels=(panel,), grids=(one.grid,), folded=flips)


def published_page(found: Sequence[PublishedComparison]) -> str:
    """Return comparisons with published scores as a page."""
    sections = tuple(_published(number, one) for number, one in enumerate(found, 1))
    return render(Page("Published scores", "Our scores with their intervals, and those of the literature.", sections))


def _published(number: int, one: PublishedComparison) -> Section:
    return Section(f"published-{number}", f"{one.protocol}: {one.column.name}", grids=(one.grid,))
