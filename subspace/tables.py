"""The one place where results become tables: tasks down, runs across, accuracy in per cent with its standard error.

Numbers stand side by side only where their fingerprints agree (see ``results.py``); anything else is refused, with what
differs and how to make it equal. Of two runs the difference is shown too. Its standard error is that of the items' own
differences, which is smaller than that of either run, since both were asked the same questions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from subspace import declarations
from subspace.errors import UserError, nearest
from subspace.results import Score, TaskResult, correct, mean, paired_difference, read_results

if TYPE_CHECKING:
    import rich.table

HEAD = ("task", "metric", "items", "majority")
NONE = "-"

# How two runs are made alike in an ingredient of their fingerprints.
REMEDIES = {
    "items": "score both with the same evaluate.limit and evaluate.split",
    "template": "score both with the same evaluate.prompt and the same declarations",
    "tokenizer": "use one base model: another tokenizer cuts the texts differently",
}


@dataclass(frozen=True)
class Run:
    """One column: its name, and its results by task, all of one protocol."""

    name: str
    results: dict[str, TaskResult]

    @property
    def about(self) -> str:
        """Which model was scored, with which adapters, in which precision."""
        one = next(iter(self.results.values()))
        return f"{one.model or 'a model'}{f' with {one.adapter}' if one.adapter else ''}, {one.dtype}"


@dataclass(frozen=True)
class Row:
    """One metric of one task, or the mean: a score for each run, None where a run has none."""

    task: str
    metric: str
    n: int
    majority: float
    scores: tuple[Score | None, ...]
    difference: Score | None
    in_mean: bool
    fingerprint: str

    @property
    def cells(self) -> list[str]:
        """The row as text, the difference last."""
        metric = self.metric if self.in_mean else f"({self.metric})"
        scores = [NONE if score is None else _percent(score) for score in self.scores]
        difference = NONE if self.difference is None else _percent(self.difference, sign="+")
        return [_title(self.task), metric, str(self.n), f"{100 * self.majority:.1f}", *scores, difference]


@dataclass(frozen=True)
class Table:
    """The results of some runs by one protocol."""

    protocol: str
    runs: tuple[Run, ...]
    rows: tuple[Row, ...]
    mean: Row | None
    notes: tuple[str, ...]

    @property
    def title(self) -> str:
        """What the numbers are."""
        return f"{self.protocol}: accuracy in %, with its standard error"

    @property
    def cells(self) -> list[list[str]]:
        """The table as text, its head first and the mean last."""
        difference = ["difference"] if len(self.runs) == 2 else []
        head = [*HEAD, *(run.name for run in self.runs), *difference]
        rows = [*self.rows, self.mean] if self.mean else self.rows
        return [head, *(row.cells[: len(head)] for row in rows)]

    def markdown(self) -> str:
        """Return the table in Markdown, its notes below."""
        head, *rows = self.cells
        rule = [":---", ":---", *["---:"] * (len(head) - 2)]
        lines = [f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)]
        return "\n".join([f"**{self.title}**", "", *lines, "", *(f"- {note}" for note in self.notes)])

    def rich(self) -> rich.table.Table:
        """Return the table for a terminal."""
        from rich import box
        from rich.table import Table as RichTable

        head, *rows = self.cells
        table = RichTable(
            title=self.title,
            title_justify="left",
            caption="\n".join(self.notes),
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
        )
        for number, name in enumerate(head):
            table.add_column(name, justify="left" if number < 2 else "right", no_wrap=True)
        for row, cells in zip(self.rows, rows, strict=False):
            table.add_row(*cells, style=None if row.in_mean else "dim")
        if self.mean:
            table.add_section()
            table.add_row(*rows[-1], style="bold")
        return table

    def as_dict(self) -> dict[str, Any]:
        """Return the table for machines; shares lie between 0 and 1."""

        def plain(score: Score | None) -> dict[str, float] | None:
            return None if score is None else score._asdict()

        def values(row: Row) -> dict[str, Any]:
            scores = {run.name: plain(score) for run, score in zip(self.runs, row.scores, strict=True)}
            return dataclasses.asdict(row) | {"scores": scores, "difference": plain(row.difference)}

        return {
            "protocol": self.protocol,
            "runs": {run.name: run.about for run in self.runs},
            "rows": [values(row) for row in self.rows],
            "mean": values(self.mean) if self.mean else None,
            "notes": list(self.notes),
        }


def show(table: Table) -> None:
    """Print a table on standard output, in its full width whatever the terminal's."""
    from rich.console import Console

    grid = table.rich()
    Console(width=Console(width=1000).measure(grid).maximum).print(grid)


def tables(folders: Sequence[Path], protocol: str | None = None) -> list[Table]:
    """Return the tables of these runs: one for each protocol that all were scored by, or for the one that is named."""
    folders = list(dict.fromkeys(folders))
    names = _names(folders)
    scored: dict[str, dict[str, Run]] = {}  # by protocol, then by name
    for name, folder in zip(names, folders, strict=True):
        for result in read_results(folder):
            run = scored.setdefault(result.protocol, {}).setdefault(name, Run(name, {}))
            run.results[result.task] = result

    if protocol is not None and protocol not in scored:
        raise UserError(f"none of {', '.join(names)} was scored by {protocol!r}. {nearest(protocol, scored)}")
    wanted = [protocol] if protocol else [name for name, runs in scored.items() if len(runs) == len(names)]
    for name in wanted or scored:
        if lacking := [str(folder) for run, folder in zip(names, folders, strict=True) if run not in scored[name]]:
            raise UserError(
                f"{', '.join(names)} cannot be put side by side: {lacking[0]} was not scored by {name}. "
                f"Run: subspace evaluate {lacking[0]} evaluate.protocol={name}"
            )
    return [compare(list(scored[name].values())) for name in wanted]


def compare(runs: Sequence[Run]) -> Table:
    """Put runs of one protocol side by side; UserError where a fingerprint differs."""
    everywhere = set.intersection(*(set(run.results) for run in runs))
    somewhere = {task for run in runs for task in run.results}
    order = [*declarations.tasks(), *sorted(somewhere)]
    rows = []
    for task in sorted(somewhere, key=order.index):
        results = [run.results.get(task) for run in runs]
        _refuse_unlike(runs, results)
        one = next(result for result in results if result)
        # A task's metrics begin with the one that is usually reported.
        rows += [_row(metric, results, in_mean=task in everywhere and i == 0) for i, metric in enumerate(one.metrics)]
    return Table(
        protocol=next(iter(runs[0].results.values())).protocol,
        runs=tuple(runs),
        rows=tuple(rows),
        mean=_mean([row for row in rows if row.in_mean]),
        notes=tuple(_notes(runs, rows)),
    )


def _refuse_unlike(runs: Sequence[Run], results: Sequence[TaskResult | None]) -> None:
    (name, one), *others = [(run.name, result) for run, result in zip(runs, results, strict=True) if result]
    for other_name, other in others:
        if one.fingerprint == other.fingerprint:
            continue
        parts = dict.fromkeys([*one.ingredients, *other.ingredients])
        unlike = [part for part in parts if one.ingredients.get(part) != other.ingredients.get(part)]
        remedy = REMEDIES.get(unlike[0], "score both with the same version of subspace and its declarations")
        raise UserError(
            f"{name} and {other_name} cannot be put side by side: in {_title(one.task)} they differ in "
            f"{', '.join(unlike)} ({one.n} items, fingerprint {one.fingerprint}; {other.n} items, fingerprint "
            f"{other.fingerprint}). To compare them, {remedy}"
        )


def _row(metric: str, results: Sequence[TaskResult | None], *, in_mean: bool) -> Row:
    one = next(result for result in results if result)
    return Row(
        task=one.task,
        metric=metric,
        n=one.n,
        majority=one.majority,
        scores=tuple(result.metrics[metric] if result else None for result in results),
        difference=_difference(metric, *results) if len(results) == 2 else None,
        in_mean=in_mean,
        fingerprint=one.fingerprint,
    )


def _difference(metric: str, before: TaskResult | None, after: TaskResult | None) -> Score | None:
    if not (before and after and before.items and after.items):
        return None
    return paired_difference(correct(before.items, metric), correct(after.items, metric))


def _mean(rows: Sequence[Row]) -> Row | None:
    if not rows:
        return None
    differences = [row.difference for row in rows if row.difference]
    return Row(
        task=f"mean of {len(rows)}",
        metric="",
        n=sum(row.n for row in rows),
        majority=sum(row.majority for row in rows) / len(rows),
        scores=tuple(
            mean([score for score in column if score]) for column in zip(*(r.scores for r in rows), strict=True)
        ),
        difference=mean(differences) if len(differences) == len(rows) else None,
        in_mean=True,
        fingerprint="",
    )


def _notes(runs: Sequence[Run], rows: Sequence[Row]) -> list[str]:
    notes = [f"{run.name}: {run.about}" for run in runs]
    if len(runs) == 2:
        notes.append(f"difference: {runs[1].name} less {runs[0].name}, over the same items")
    if any(not row.in_mean for row in rows):
        notes.append("rows in brackets are not in the mean")
    for run in runs:
        if truncated := sum(result.truncated for result in run.results.values()):
            notes.append(f"{run.name}: {truncated} items were longer than the model reads and lost their beginning")
    return notes


def _names(folders: Sequence[Path]) -> list[str]:
    """Call each run by its folder's name, or by its whole path where two have the same."""
    last = [folder.resolve().name for folder in folders]
    return [name if last.count(name) == 1 else str(folder) for name, folder in zip(last, folders, strict=True)]


def _percent(score: Score, sign: str = "") -> str:
    return f"{100 * score.value:{sign}.1f} ± {100 * score.error:.1f}"


def _title(task: str) -> str:
    known = declarations.tasks()
    return known[task].title if task in known else task
