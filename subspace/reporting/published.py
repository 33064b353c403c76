"""``subspace compare --published``: comparison of a run's scores with the published ones for its settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from subspace.common.tables import Grid, csv_text
from subspace.errors import UserError
from subspace.reporting import statistics
from subspace.reporting.runs import Column, load_runs, title
from subspace.reporting.statistics import Estimate
from subspace.reporting.tables import interval

HEAD = ("task", "items", "ours [95 % interval]", "published", "difference", "inside")
NONE = "-"
ROUNDING = 0.0005  # published scores are percentages with one digit after the point


@dataclass(frozen=True)
class PublishedRow:
    """One task, or the average: accuracies between 0 and 1; ``ours`` is None if the task was not scored."""

    task: str
    n: int
    ours: Estimate | None
    published: float

    @property
    def inside(self) -> bool | None:
        """True if the published score, within its rounding, lies in the interval of ours; None without ours."""
        if self.ours is None:
            return None
        return self.ours.low - ROUNDING <= self.published <= self.ours.high + ROUNDING

    @property
    def texts(self) -> tuple[str, ...]:
        """The cells of the row as text."""
        published = f"{100 * self.published:.1f}"
        if self.ours is None:
            return title(self.task), NONE, NONE, published, NONE, NONE
        ours = f"{100 * self.ours.value:.1f} {interval(self.ours.low, self.ours.high)}"
        difference = f"{100 * (self.ours.value - self.published):+.1f}"
        return title(self.task), str(self.n), ours, published, difference, "yes" if self.inside else "no"


@dataclass(frozen=True)
class PublishedComparison:
    """Comparison of a method's scores by one protocol with the published ones."""

    protocol: str
    column: Column
    source: str
    tasks: tuple[PublishedRow, ...]
    average: PublishedRow | None

    @property
    def rows(self) -> tuple[PublishedRow, ...]:
        """The tasks, and the average where one was published."""
        return self.tasks + ((self.average,) if self.average else ())

    @property
    def grid(self) -> Grid:
        """The comparison as a table."""
        notes = (
            f"{self.column.name}: {self.column.about}",
            f"published: {self.source}",
            "the interval is that of our score; the published one has a sampling error of its own",
        )
        heading = f"{self.protocol}: {self.column.name} and the published scores, accuracy in %"
        rows = tuple(row.texts for row in self.rows)
        return Grid(heading, HEAD, rows, notes, left=1, last=1 if self.average else 0)

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON values; accuracies lie between 0 and 1."""

        def plain(row: PublishedRow) -> dict[str, Any]:
            return {**dataclasses.asdict(row), "ours": row.ours and row.ours._asdict(), "inside": row.inside}

        return {
            "protocol": self.protocol,
            "name": self.column.name,
            "about": self.column.about,
            "source": self.source,
            "tasks": [plain(row) for row in self.tasks],
            "average": self.average and plain(self.average),
        }


def compare_with_published(folders: Sequence[Path], protocol: str | None = None) -> list[PublishedComparison]:
    """Return comparisons of scored runs with the ``published`` scores of their configurations, grouped over seeds.

    Raises:
        UserError: a run whose configuration has no published scores, or that was scored on none of their tasks.
    """
    return [_compare(column) for columns in load_runs(folders, protocol) for column in columns]


def published_csv(found: Sequence[PublishedComparison]) -> str:
    """Return comparisons as CSV with one line for each task and average of each of them."""
    rows = [
        {
            "protocol": one.protocol, "name": one.column.name, "task": row.task, "items": row.n,
            **(row.ours._asdict() if row.ours else {}), "published": row.published, "inside": row.inside,
        }
        for one in found
        for row in one.rows
    ]  # fmt: skip
    return csv_text(rows)


def _compare(column: Column) -> PublishedComparison:
    run = column.runs[0]
    declared: Mapping[str, Any] = run.config.get("published") or {}
    scores = {task: value / 100 for task, value in declared.items() if task not in ("source", "average")}
    if not scores:
        raise UserError(
            f"{run.folder} was to be compared with published scores, but its configuration has none. Add them to "
            f"{run.folder / 'config.yaml'}, as 'published: {{boolq: 69.7, source: WHERE}}'"
        )
    results = {task: result for task in scores if (result := column.result(task))}
    if not results:
        raise UserError(
            f"{run.folder} was scored on none of the tasks with published scores: {', '.join(scores)}. "
            f"Run: subspace evaluate {run.folder}"
        )
    marks = {task: column.marks(task, next(iter(result.metrics))) for task, result in results.items()}
    tasks = tuple(
        PublishedRow(
            task,
            results[task].n if task in results else 0,
            statistics.estimate([marks[task]]) if task in results else None,
            published,
        )
        for task, published in scores.items()
    )
    average = None
    if "average" in declared:
        ours = statistics.estimate(list(marks.values())) if len(results) == len(scores) else None
        average = PublishedRow("average", sum(row.n for row in tasks), ours, declared["average"] / 100)
    protocol = next(iter(results.values())).protocol
    return PublishedComparison(protocol, column, str(declared.get("source", "")), tasks, average)
