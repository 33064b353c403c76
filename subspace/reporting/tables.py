"""Result tables: a row for each task, a column for each method, accuracy in per cent with its 95 % interval.

Numbers are put side by side only if their fingerprints agree (see ``results.py``). Runs that differ only in their seed
are one column, with mean and standard deviation. The best cells of a row, all of them if several are equal, and those
not significantly different from it are marked. Below stand what the methods' training took.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from subspace.common.tables import BEST, TIED, Grid
from subspace.data.tasks import list_tasks
from subspace.evaluation.results import TaskResult
from subspace.reporting import statistics
from subspace.reporting.retention import KEPT, Kept
from subspace.reporting.runs import Column, ensure_comparable, load_runs, suite, title
from subspace.reporting.statistics import ALPHA, Difference

HEAD = ("task", "metric", "items", "majority")
NONE = "-"


@dataclass(frozen=True)
class Cell:
    """One method's accuracy, between 0 and 1; ``p`` of its difference from the row's best, Holm-corrected."""

    value: float
    error: float
    low: float
    high: float
    sd: float | None
    seeds: int
    p: float | None = None
    best: bool = False

    def __str__(self) -> str:
        spread = "" if self.sd is None else f" ± {100 * self.sd:.1f}"
        mark = f" {BEST}" if self.best else f" {TIED}" if self.p is not None and self.p >= ALPHA else ""
        return f"{100 * self.value:.1f}{spread} {interval(self.low, self.high)}{mark}"


@dataclass(frozen=True)
class Row:
    """One metric of one task, or a mean: a cell for each method, None if the method was not scored."""

    task: str
    title: str
    metric: str
    n: int
    majority: float
    cells: tuple[Cell | None, ...]
    difference: Difference | None
    in_mean: bool
    fingerprint: str

    @property
    def texts(self) -> tuple[str, ...]:
        """The cells of the row as text, the difference last."""
        metric = self.metric if self.in_mean else f"({self.metric})"
        cells = [NONE if cell is None else str(cell) for cell in self.cells]
        d = self.difference
        difference = NONE if d is None else f"{100 * d.value:+.1f} {interval(d.low, d.high, sign='+')}"
        return self.title, metric, str(self.n), f"{100 * self.majority:.1f}", *cells, difference


@dataclass(frozen=True)
class Table:
    """Results of methods by one protocol. ``means`` has one row for each suite."""

    protocol: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    means: tuple[Row, ...]
    notes: tuple[str, ...]

    @property
    def grid(self) -> Grid:
        """The table as text cells."""
        difference = ["difference"] if len(self.columns) == 2 else []
        head = (*HEAD, *(column.name for column in self.columns), *difference)
        rows = tuple(row.texts[: len(head)] for row in (*self.rows, *self.means))
        facts = [*self._kept(len(head)), *self._facts(len(head))]
        heading = f"{self.protocol}: accuracy in % [95 % interval]"
        return Grid(heading, head, (*rows, *facts), self.notes, left=2, last=len(self.means), facts=len(facts))

    def _kept(self, width: int) -> list[tuple[str, ...]]:
        """Return the row of what is kept of the base, if that was measured of any method; only what is alike."""
        kept = alike(self.columns)
        if not (first := next(filter(None, kept), None)):
            return []
        cells = [NONE if found is None else str(found) for found in kept]
        row = [KEPT, "bits/byte", str(first.passages), "", *cells]
        return [(*row, *[""] * (width - len(row)))]

    def _facts(self, width: int) -> list[tuple[str, ...]]:
        """Return rows of what training took, unless nothing is known of any method."""
        several = [column.facts.texts for column in self.columns]
        rows = [[name, "", "", "", *(texts[name] for texts in several)] for name in several[0]]
        return [(*row, *[""] * (width - len(row))) for row in rows if set(row[4:]) != {NONE}]

    def markdown(self) -> str:
        """Return the table in Markdown, with its notes below."""
        return self.grid.markdown()

    def as_dict(self) -> dict[str, Any]:
        """Return the table as JSON values; accuracies lie between 0 and 1."""
        names = [column.name for column in self.columns]

        def values(row: Row) -> dict[str, Any]:
            plain = {f.name: getattr(row, f.name) for f in dataclasses.fields(row) if f.name != "cells"}
            scores = [cell and dataclasses.asdict(cell) for cell in row.cells]
            difference = row.difference and row.difference._asdict()
            return {**plain, "scores": dict(zip(names, scores, strict=True)), "difference": difference}

        return {
            "protocol": self.protocol,
            "methods": {
                c.name: {
                    "about": c.about,
                    "runs": [str(run.folder) for run in c.runs],
                    **{name: value for name, value in c.facts._asdict().items() if value is not None},
                    **({KEPT: _kept_dict(found)} if found else {}),
                }
                for c, found in zip(self.columns, alike(self.columns), strict=True)
            },
            "rows": [values(row) for row in self.rows],
            "means": [values(row) for row in self.means],
            "notes": list(self.notes),
        }


def alike(columns: Sequence[Column]) -> list[Kept | None]:
    """Return what each method has kept of its base, where it was measured as of the first one that was measured."""
    found = [column.kept for column in columns]
    first = next(filter(None, found), None)
    return [kept if kept and first and kept.fingerprint == first.fingerprint else None for kept in found]


def _kept_dict(kept: Kept) -> dict[str, Any]:
    more = kept.more and {name: v if math.isfinite(v) else None for name, v in kept.more._asdict().items()}
    return {"passages": kept.passages, "base_bits_per_byte": kept.base, "more": more}


def build_tables(folders: Sequence[Path], protocol: str | None = None) -> list[Table]:
    """Return the tables of these runs: one for the named protocol, or for each that all were scored by."""
    return [build_table(columns) for columns in load_runs(folders, protocol)]


def build_table(columns: Sequence[Column]) -> Table:
    """Return the table of methods that were scored by one protocol.

    Raises:
        UserError: fingerprints or items of a task differ between runs.
    """
    runs = [run for column in columns for run in column.runs]
    ensure_comparable(runs)
    scored_tasks = {task for run in runs for task in run.results}
    order = [*list_tasks(None), *sorted(scored_tasks)]
    rows: list[Row] = []
    suites: dict[str, list[Row]] = {}
    suite_of: dict[str, str] = {}
    for task in sorted(scored_tasks, key=order.index):
        results = [column.result(task) for column in columns]
        result = next((result for result in results if result), None)
        suite_of[task] = suite(task, result)
        for i, metric in enumerate(result.metrics if result else ()):
            # The first metric of a task is the one that is usually reported.
            rows.append(_row(columns, [task], [metric], result, in_mean=i == 0 and all(results)))
            if rows[-1].in_mean:
                suites.setdefault(suite_of[task], []).append(rows[-1])
    means = []
    for name, suite_rows in suites.items():
        if len({row.task for row in rows if suite_of[row.task] == name}) == 1:
            continue  # the mean of one task repeats its row
        name = f"mean of {len(suite_rows)}" + (f" {name}" if len(suites) > 1 else "")
        mean = _row(columns, [row.task for row in suite_rows], [row.metric for row in suite_rows], None, in_mean=True)
        majority = sum(row.majority for row in suite_rows) / len(suite_rows)
        means.append(
            dataclasses.replace(
                mean, task=name, title=name, metric="", n=sum(row.n for row in suite_rows), majority=majority
            )
        )
    return Table(
        protocol=next(iter(runs[0].results.values())).protocol,
        columns=tuple(columns),
        rows=tuple(rows),
        means=tuple(means),
        notes=tuple(_notes(columns, rows)),
    )


def _row(
    columns: Sequence[Column], tasks: Sequence[str], metrics: Sequence[str], result: TaskResult | None, *, in_mean: bool
) -> Row:
    """Return the row of one task, or of the mean over tasks (``result`` is None)."""
    marks = [
        [column.marks(task, metric) for task, metric in zip(tasks, metrics, strict=True)]
        if all(column.result(task) for task in tasks)
        else None
        for column in columns
    ]
    cells = [
        Cell(*statistics.estimate(run), statistics.seed_spread(run), len(run[0])) if run else None for run in marks
    ]
    scored = {i: (cell, run) for i, (cell, run) in enumerate(zip(cells, marks, strict=True)) if cell and run}
    if len(scored) > 1:
        highest = max(cell.value for cell, _ in scored.values())
        best = [i for i in scored if math.isclose(scored[i][0].value, highest, abs_tol=1e-12)]
        others = [i for i in scored if i not in best]
        # Of several best ones one is compared with, whatever the order of the columns.
        reference = min(best, key=lambda i: columns[i].name)
        p_values = statistics.holm([statistics.difference(scored[i][1], scored[reference][1]).p for i in others])
        for i, p in zip(others, p_values, strict=True):
            cells[i] = dataclasses.replace(scored[i][0], p=p)
        for i in best:
            cells[i] = dataclasses.replace(scored[i][0], best=True)
    return Row(
        task=tasks[0],
        title=title(tasks[0], result),
        metric=metrics[0],
        n=result.n if result else 0,
        majority=result.majority if result else 0.0,
        cells=tuple(cells),
        difference=statistics.difference(scored[0][1], scored[1][1]) if len(scored) == len(columns) == 2 else None,
        in_mean=in_mean,
        fingerprint=result.fingerprint if result else "",
    )


def _notes(columns: Sequence[Column], rows: Sequence[Row]) -> list[str]:
    notes = [f"{column.name}: {column.about}" for column in columns]
    if len(columns) > 1:
        notes.append(f"{BEST} best, {TIED} not significantly different from the best (p ≥ {ALPHA} after Holm)")
    if any(len(column.runs) > 1 for column in columns):
        notes.append("± standard deviation over seeds; these intervals hold for the method, over seeds and items")
    lone = [column for column in columns if len(column.runs) == 1 and column.runs[0].seed is not None]
    if lone and len(columns) > 1:
        notes.append(
            f"one seed only: {', '.join(c.name for c in lone)}. These numbers hold for the runs, not for the methods"
        )
    if len(columns) == 2:
        notes.append(f"difference: {columns[1].name} minus {columns[0].name}, over the same items")
    if measured := next(filter(None, alike(columns)), None):
        notes.append(measured.note)
        if other := [c.name for c, kept in zip(columns, alike(columns), strict=True) if c.kept and not kept]:
            notes.append(f"{KEPT} of {', '.join(other)} is of other passages: measure all with one retention_limit")
    if any(not row.in_mean for row in rows):
        notes.append("rows in brackets are not in the mean")
    for run in (run for column in columns for run in column.runs):
        if truncated := sum(result.truncated for result in run.results.values()):
            notes.append(f"{run.name}: {truncated} items exceeded the model's window and lost their beginning")
    return notes


def interval(low: float, high: float, sign: str = "") -> str:
    """Return an interval as text, in per cent."""
    return f"[{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"
