"""``subspace compare``: paired tests of whether methods differ from a first one on the same items."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from subspace.common.tables import Grid, csv_text
from subspace.data.tasks import list_tasks
from subspace.errors import UserError
from subspace.evaluation.results import read_verified_items
from subspace.reporting import statistics
from subspace.reporting.runs import Column, ScoredRun, ensure_comparable, load_runs, suite, title
from subspace.reporting.statistics import ALPHA, POWER, Difference
from subspace.reporting.tables import interval

HEAD = ("task", "items", "before", "after", "lost", "gained", "difference", "p", "p (Holm)", "detectable")


@dataclass(frozen=True)
class ComparisonRow:
    """One task, or a mean: accuracies before and after; ``detectable`` is the smallest detectable difference."""

    task: str
    title: str
    metric: str
    n: int
    before: float
    after: float
    difference: Difference
    corrected: float
    detectable: float | None

    @property
    def texts(self) -> tuple[str, ...]:
        """The cells of the row as text."""
        d = self.difference
        shares = (f"{100 * self.before:.1f}", f"{100 * self.after:.1f}", f"{d.lost:.4g}", f"{d.gained:.4g}")
        difference = f"{100 * d.value:+.1f} {interval(d.low, d.high, sign='+')}"
        return self.title, str(self.n), *shares, difference, _p(d.p), _p(self.corrected), _points(self.detectable)


@dataclass(frozen=True)
class Flip:
    """Item that only one of two methods answered correctly; ``before`` and ``after`` are their predictions."""

    task: str
    id: str
    label: Any
    before: Any
    after: Any
    gained: bool


@dataclass(frozen=True)
class Comparison:
    """Comparison of a method with the first one by one protocol. ``means`` has one row for each suite.

    ``others`` is the number of methods that are compared with the first.
    """

    protocol: str
    first: Column
    other: Column
    tasks: tuple[ComparisonRow, ...]
    means: tuple[ComparisonRow, ...]
    others: int

    @property
    def grid(self) -> Grid:
        """The comparison as a table."""
        seeds = len(self.first.runs) > 1 or len(self.other.runs) > 1
        test = "Student's t, over seeds and items" if seeds else "McNemar's exact test (means: in strata)"
        notes = [
            f"before: {self.first.about}",
            f"after: {self.other.about}",
            f"p: {test}; p (Holm): corrected over {self.others * len(self.tasks)} tests of tasks, "
            f"means over {self.others} of methods",
            f"detectable: the smallest true difference detected on these items with probability {100 * POWER:.0f} %",
        ]
        named = {line.task for line in self.tasks}
        means = [line for line in self.means if line.task not in named]  # the mean of one task repeats its row
        rows = tuple(line.texts for line in (*self.tasks, *means))
        heading = f"{self.protocol}: {self.other.name} minus {self.first.name}, in points [95 % interval]"
        return Grid(heading, HEAD, rows, tuple(notes), left=1, last=len(means))

    @property
    def verdict(self) -> str:
        """The conclusion in words, one line for each mean."""
        return "\n".join(self._verdict(line) for line in self.means)

    def _verdict(self, line: ComparisonRow) -> str:
        d, names = line.difference, f"{self.other.name} and {self.first.name}"
        result = f"{100 * d.value:+.1f} points {interval(d.low, d.high, sign='+')}, p {_p(line.corrected, equal=True)}"
        if line.corrected < ALPHA:
            word = "better" if d.value > 0 else "worse"
            return f"{line.title}: {self.other.name} is {word} than {self.first.name}: {result}"
        smallest = f"the smallest detectable difference is {_points(line.detectable)} points"
        return f"{line.title}: {names} do not differ significantly on these items: {result}; {smallest}"

    @property
    def flips(self) -> list[Flip]:
        """The items that only one of the two answered correctly; over seeds, in at least half more of its seeds."""
        flips = []
        for line in self.tasks:
            before, after = (column.marks(line.task, line.metric).mean(0) for column in (self.first, self.other))
            numbers = [i for i, change in enumerate(after - before) if abs(change) >= 0.5]
            predictions = [self._predictions(column, line) for column in (self.first, self.other)]
            for i in numbers:
                label, ids = predictions[0][i][1], self.first.runs[0].marks(line.task).ids
                first, other = predictions[0][i][0], predictions[1][i][0]
                flips.append(Flip(line.task, ids[i], label, first, other, bool(after[i] > before[i])))
        return flips

    @staticmethod
    def _predictions(column: Column, line: ComparisonRow) -> list[tuple[Any, Any]]:
        """Return the prediction and the label of each item, from a method's first run."""
        pairs = []
        for record in read_verified_items(column.runs[0].results[line.task]):
            prediction = record.get("prediction")
            if isinstance(prediction, dict):
                prediction = prediction.get(line.metric)
            pairs.append((prediction, record.get("label")))
        return pairs

    @property
    def flipped(self) -> Grid:
        """The flipped items as a table."""
        titles = {line.task: line.title for line in self.tasks}
        rows = tuple(
            (titles[f.task], f.id, "gained" if f.gained else "lost", str(f.label), str(f.before), str(f.after))
            for f in self.flips
        )
        head = ("task", "item", "change", "label", self.first.name, self.other.name)
        note = (
            ("the predictions are those of the first seed",) if len(self.first.runs) + len(self.other.runs) > 2 else ()
        )
        return Grid(f"{len(rows)} items flipped", head, rows, note, left=len(head))

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON values; accuracies lie between 0 and 1."""

        def plain(line: ComparisonRow) -> dict[str, Any]:
            return {**dataclasses.asdict(line), "difference": line.difference._asdict()}

        return {
            "protocol": self.protocol,
            "before": {"name": self.first.name, "about": self.first.about},
            "after": {"name": self.other.name, "about": self.other.about},
            "tasks": [plain(line) for line in self.tasks],
            "means": [plain(line) for line in self.means],
            "verdict": self.verdict,
            "flips": [dataclasses.asdict(flip) for flip in self.flips],
        }


def compare_runs(folders: Sequence[Path], protocol: str | None = None) -> list[Comparison]:
    """Return comparisons of each method with the first one, by the named protocol or by all that they share.

    Raises:
        UserError: there is only one method, or the runs are not comparable.
    """
    comparisons = []
    for columns in load_runs(folders, protocol):
        if len(columns) < 2:
            names = ", ".join(map(str, folders))
            hint = " They are seeds of one method." if len(folders) > 1 else ""
            raise UserError(
                f"{names} cannot be compared: there is no second method.{hint} Name the run of another one as well"
            )
        _refuse_several_subjects(columns)
        comparisons += compare_columns(columns)
    return comparisons


def _refuse_several_subjects(columns: Sequence[Column]) -> None:
    """Raise UserError for a folder whose results are of different weights, which no comparison can be about."""
    by_folder: dict[Path, list[ScoredRun]] = {}
    for run in (run for column in columns for run in column.runs):
        by_folder.setdefault(run.folder, []).append(run)
    for folder, runs in by_folder.items():
        if len(runs) > 1:
            parts = "; ".join(f"{run.name}: {', '.join(run.results)}" for run in runs)
            raise UserError(
                f"{folder} cannot be compared: its results are of different weights or dtypes ({parts}). Score all "
                f"its tasks with the same settings: subspace evaluate {folder}"
            )


def compare_columns(columns: Sequence[Column]) -> list[Comparison]:
    """Return comparisons of each method with the first one, Holm-corrected over all task tests and over all means.

    Raises:
        UserError: the columns are not comparable, or have no task in common.
    """
    ensure_comparable([run for column in columns for run in column.runs])
    first, *others = columns
    tasks = [task for task in list_tasks(None) if all(column.result(task) for column in columns)]
    tasks += sorted({task for run in first.runs for task in run.results if task not in list_tasks(None)})
    tasks = [task for task in tasks if all(column.result(task) for column in columns)]
    if not tasks:
        raise UserError(f"{', '.join(c.name for c in columns)} have no task in common. Score them on the same tasks")
    suites: dict[str, list[str]] = {}
    for task in tasks:
        suites.setdefault(suite(task, first.result(task)), []).append(task)

    def mean_name(name: str) -> str:
        if len(suites[name]) == 1:
            return suites[name][0]
        return f"mean of {len(suites[name])}" + (f" {name}" if len(suites) > 1 else "")

    by_task = [[_line(first, other, task, [task]) for task in tasks] for other in others]
    by_suite = [[_line(first, other, mean_name(name), suites[name]) for name in suites] for other in others]
    return [
        Comparison(
            next(iter(first.runs[0].results.values())).protocol, first, other, tuple(lines), tuple(means), len(others)
        )
        for other, lines, means in zip(others, _corrected(by_task), _corrected(by_suite), strict=True)
    ]


def comparisons_csv(found: Sequence[Comparison]) -> str:
    """Return comparisons as CSV with one line for each task and mean of each of them."""
    rows = [
        {
            "protocol": one.protocol, "first": one.first.name, "other": one.other.name, "task": line.task,
            "metric": line.metric, "items": line.n, "mean": mean, "before": line.before, "after": line.after,
            **{"difference" if name == "value" else name: value for name, value in line.difference._asdict().items()},
            "p_holm": line.corrected, "detectable": line.detectable,
        }
        for one in found
        for mean, lines in ((False, one.tasks), (True, one.means))
        for line in lines
    ]  # fmt: skip
    return csv_text(rows)


def _line(first: Column, other: Column, name: str, tasks: Sequence[str]) -> ComparisonRow:
    results = [result for task in tasks if (result := first.result(task))]
    metrics = [next(iter(result.metrics)) for result in results]
    before, after = (
        [column.marks(task, metric) for task, metric in zip(tasks, metrics, strict=True)] for column in (first, other)
    )
    difference = statistics.difference(before, after)
    return ComparisonRow(
        task=name,
        title=title(name, first.result(name)),
        metric=metrics[0] if len(tasks) == 1 else "",
        n=sum(result.n for result in results),
        before=statistics.estimate(before).value,
        after=statistics.estimate(after).value,
        difference=difference,
        corrected=difference.p,
        detectable=statistics.detectable_between(before, after),
    )


def _corrected(lines: Sequence[Sequence[ComparisonRow]]) -> list[list[ComparisonRow]]:
    p_values = iter(statistics.holm([line.difference.p for group in lines for line in group]))
    return [[dataclasses.replace(line, corrected=next(p_values)) for line in group] for group in lines]


def _points(share: float | None) -> str:
    return "none" if share is None else f"{100 * share:.1f}"


def _p(value: float, *, equal: bool = False) -> str:
    return "< 0.0001" if value < 1e-4 else f"{'= ' if equal else ''}{value:.2g}"
