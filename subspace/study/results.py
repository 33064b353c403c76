"""What a study's finished cells say: each method's held-out losses, its differences from the reference, its groups."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from subspace.errors import UserError
from subspace.evaluation.records import ItemRecord
from subspace.evaluation.results import read_items
from subspace.reporting.continuous import MeanDifference, Spread, paired_difference, paired_over_seeds, spread
from subspace.reporting.retention import Kept, read_kept
from subspace.reporting.runs import ScoredRun, ensure_comparable, load_runs
from subspace.reporting.statistics import ALPHA, Array, Estimate, Run, estimate, holm
from subspace.study.cells import Cell, final_cells, read_search
from subspace.study.config import ANSWER_LOGPROB, RETENTION
from subspace.study.grid import Contender, Grid
from subspace.study.search import Losses, Outcome, Side, Trial, common_rates, kendall_tau, letters

#: Protocols that give the log-probability of every answer of an item.
ANSWERING = ("answer-word", "likelihood")


@dataclass(frozen=True)
class Scores:
    """A method's finals on the items: of each task ``(seeds, items)``, and on the mean over tasks."""

    log_odds: Run
    correct: Run
    tasks: tuple[str, ...]

    @property
    def items(self) -> list[int]:
        """The number of items of each task."""
        return [task.shape[1] for task in self.log_odds]

    def of_seeds(self, numbers: Sequence[int]) -> Scores:
        """Return those of some seeds, by their places."""
        return Scores([t[numbers] for t in self.log_odds], [t[numbers] for t in self.correct], self.tasks)


@dataclass(frozen=True)
class MethodResult:
    """What is known of a method.

    Attributes:
        contender: the method at its size.
        best: its best trial; None while the search goes on.
        edge: the side of the ladder at whose end that still lies.
        searched: its held-out loss in the search, a minimum over trials, so it flatters.
        seeds: of its finals that ended.
        losses: their held-out losses.
        scores: their items, where all of them were scored.
        accuracy: with its interval over seeds and items.
        seconds: of a step, the median over its finals.
        memory: bytes at the peak, the most of its finals.
        against: its difference from the reference in the primary outcome; None for the reference itself.
        corrected: the p-value of that, by Holm over all methods.
        accuracy_gain: its difference from the reference in accuracy; the sign must agree for it to be better.
        kept: how many bits per byte more than its base its finals need for texts of no task, where that was measured.
        group: methods that share a letter are not told apart.
        failed: how many of its cells ended in a failure of their own.
    """

    contender: Contender
    best: Trial | None
    edge: Side | None
    searched: float | None
    seeds: tuple[int, ...] = ()
    losses: tuple[float, ...] = ()
    scores: Scores | None = None
    accuracy: Estimate | None = None
    seconds: float | None = None
    memory: int | None = None
    against: MeanDifference | None = None
    corrected: float | None = None
    accuracy_gain: float | None = None
    kept: Kept | None = None
    group: str = ""
    failed: int = 0

    @property
    def loss(self) -> float | None:
        """The mean held-out loss of its finals."""
        return sum(self.losses) / len(self.losses) if self.losses else None

    @property
    def verdict(self) -> str:
        """``better`` or ``worse`` than the reference, if the primary outcome says so and accuracy does not object."""
        if self.against is None or self.corrected is None or self.corrected >= ALPHA:
            return ""
        gain = self.against.value
        return "" if (self.accuracy_gain or 0) * gain < 0 else "better" if gain > 0 else "worse"


@dataclass(frozen=True)
class StudyResult:
    """The results of a study so far; ``taus`` has each common rate, Kendall's tau there, and the best method there."""

    grid: Grid
    outcome: Outcome
    losses: Losses
    methods: tuple[MethodResult, ...]
    taus: tuple[tuple[float, float, str], ...]
    spreads: tuple[Spread, ...] = field(default=())

    def method(self, label: str) -> MethodResult:
        """Return a method's result by its label."""
        return next(method for method in self.methods if method.contender.label == label)


def read_results(grid: Grid) -> StudyResult:
    """Return what the finished cells of a study say, at any time."""
    outcome, losses = read_search(grid)
    results = [_method_result(grid, contender, outcome, losses) for contender in grid.contenders]
    results = _with_scores(grid, results)
    results, spreads = compared(grid, results)
    results.sort(key=lambda result: math.inf if result.loss is None else result.loss)
    return StudyResult(grid, outcome, losses, tuple(results), tuple(_taus(grid, outcome, losses, results)), spreads)


def _method_result(grid: Grid, contender: Contender, outcome: Outcome, losses: Losses) -> MethodResult:
    label = contender.label
    best = outcome.best.get(label)
    tried = [Cell(grid, label, trial, seed) for trial in outcome.trials[label] for seed in grid.search_seeds]
    finals = [cell for cell in final_cells(grid, outcome) if cell.method == label]
    ended = [cell for cell in finals if cell.ended and grid.steps in cell.losses()]
    seconds = [taken / cell.facts()["outcome"]["steps"] for cell in ended if (taken := cell.seconds) is not None]
    return MethodResult(
        contender=contender,
        best=best,
        edge=outcome.edges.get(label),
        searched=losses[label, best, grid.steps] if best else None,
        seeds=tuple(cell.seed for cell in ended),
        losses=tuple(cell.losses()[grid.steps] for cell in ended),
        seconds=float(np.median(seconds)) if seconds else None,
        memory=max((m for cell in ended if (m := cell.peak_memory) is not None), default=None),
        kept=read_kept((cell.folder, None) for cell in ended) if RETENTION in grid.also else None,
        failed=sum(cell.failed for cell in (*tried, *finals)),
    )


# The items.


def log_odds(record: ItemRecord, right: int) -> float:
    """Return the log-odds of an item's right answer against its others: log p(right) - log sum p(other).

    A choice that is impossible (its text is empty) counts as the smallest number that is not.
    """
    scores = np.maximum(np.asarray(record["scores"], dtype=float), -1e4)
    others = np.delete(scores, right)
    top = float(others.max())
    return float(scores[right] - top - math.log(float(np.exp(others - top).sum())))


def right_answers(records: Sequence[ItemRecord], of_all: Sequence[ItemRecord]) -> list[int]:
    """Return the index of each item's right answer among its scores.

    ``answer-word`` records it as a word, as ``true``. Which place a word has is seen where it was predicted, in the
    records ``of_all`` runs; words that end in a number, as ``answer3``, tell it themselves.
    """
    places: dict[str, int] = {}
    for record in of_all:
        if isinstance(record["prediction"], str):
            places[record["prediction"]] = int(np.argmax(record["scores"]))
    return [_place(record, places) for record in records]


def _place(record: ItemRecord, places: Mapping[str, int]) -> int:
    label = record["label"]
    if isinstance(label, int):
        return label
    if label in places:
        return places[label]
    if number := re.search(r"(\d+)$", str(label)):
        return int(number[1]) - 1
    if len(record["scores"]) == 2 and len(places) == 1:  # no run ever chose it: it is not the one that was
        return 1 - next(iter(places.values()))
    raise UserError(f"which answer of {record['id']} is {label!r} cannot be told: no run chose it on any item")


def _with_scores(grid: Grid, results: Sequence[MethodResult]) -> list[MethodResult]:
    """Return the results with the items of all finals, where every one of them was scored."""
    if grid.primary != ANSWER_LOGPROB:
        return list(results)
    cells = {
        result.contender.label: [Cell(grid, result.contender.label, result.best, seed) for seed in result.seeds]
        for result in results
        if result.best is not None
    }
    every = [cell for group in cells.values() for cell in group]
    if not every or not all(cell.scored for cell in every):
        return list(results)
    runs = _scored_runs([cell.folder for cell in every])
    filled = []
    for result in results:
        own = cells.get(result.contender.label, [])
        scores = _scores([runs[cell.folder] for cell in own], list(runs.values())) if own else None
        accuracy = estimate(scores.correct) if scores else None
        filled.append(replace(result, scores=scores, accuracy=accuracy))
    return filled


def _scored_runs(folders: Sequence[Path]) -> dict[Path, ScoredRun]:
    """Return the runs by the first protocol that gives every answer's probability, checked to be comparable."""
    by_protocol = load_runs(folders)
    for protocol in ANSWERING:
        for columns in by_protocol:
            runs = [run for column in columns for run in column.runs]
            if next(iter(runs[0].results.values())).protocol == protocol:
                ensure_comparable(runs)
                return {run.folder: run for run in runs}
    raise UserError(f"the finals were scored by none of {', '.join(ANSWERING)}, which give every answer's probability")


def _scores(own: Sequence[ScoredRun], runs: Sequence[ScoredRun]) -> Scores:
    """Return the scores of a method's runs; ``runs`` are all of the study."""
    tasks = tuple(sorted(set.intersection(*(set(run.results) for run in runs))))
    odds: list[Array] = []
    for task in tasks:
        everything = [record for run in runs for record in _records(run, task)]
        of_runs = [_records(run, task) for run in own]
        rights = [right_answers(records, everything) for records in of_runs]
        pairs = [zip(records, right, strict=True) for records, right in zip(of_runs, rights, strict=True)]
        odds.append(np.array([[log_odds(record, index) for record, index in pair] for pair in pairs]))
    correct = [np.array([next(iter(run.marks(task).right.values())) for run in own], dtype=float) for task in tasks]
    return Scores(odds, correct, tasks)


@cache
def _read(file: Path) -> list[ItemRecord]:
    return read_items(file)


def _records(run: ScoredRun, task: str) -> list[ItemRecord]:
    file = run.results[task].items
    if file is None:
        raise UserError(f"{run.folder} has no stored items of {task}. Score it again: subspace evaluate {run.folder}")
    return _read(file)


# Comparisons.


def compared(grid: Grid, results: Sequence[MethodResult]) -> tuple[list[MethodResult], tuple[Spread, ...]]:
    """Return the results with their differences from the reference and groups, and the spreads of these differences."""
    reference = next(result for result in results if result.contender.label == grid.reference)
    against = {r.contender.label: difference_between(grid, reference, r) for r in results if r is not reference}
    found = {label: difference for label, difference in against.items() if difference}
    corrected = dict(zip(found, holm([difference.p for difference in found.values()]), strict=True))
    groups = _groups(grid, results)
    spreads: list[Spread] = []
    compared = []
    for result in results:
        label, gain = result.contender.label, None
        pair = common_scores(reference, result)
        if label in found and pair and pair[0].items:
            spreads.append(spread(pair[0].log_odds, pair[1].log_odds))
            gain = float(np.mean([b.mean() - a.mean() for a, b in zip(pair[0].correct, pair[1].correct, strict=True)]))
        compared.append(
            replace(
                result,
                against=found.get(label),
                corrected=corrected.get(label),
                accuracy_gain=gain,
                group=groups.get(label, ""),
            )
        )
    return compared, tuple(spreads)


def _groups(grid: Grid, results: Sequence[MethodResult]) -> dict[str, str]:
    """Return each method's letters, by Holm over all pairs."""
    able = [result for result in results if result.seeds]
    pairs = [(a, b) for i, a in enumerate(able) for b in able[:i]]
    tested = [(a, b, difference) for a, b in pairs if (difference := difference_between(grid, a, b))]
    p_values = holm([difference.p for _, _, difference in tested])
    apart = {
        frozenset((a.contender.label, b.contender.label))
        for (a, b, _), p in zip(tested, p_values, strict=True)
        if p < ALPHA
    }
    order = sorted(able, key=lambda result: _standing(grid, result), reverse=True)
    return letters([result.contender.label for result in order], apart) if tested else {}


def _standing(grid: Grid, result: MethodResult) -> float:
    """Return how good a method is by the primary outcome: more is better."""
    if result.scores:
        return float(np.mean([task.mean() for task in result.scores.log_odds]))
    return -(result.loss if result.loss is not None else math.inf)


def difference_between(grid: Grid, before: MethodResult, after: MethodResult) -> MeanDifference | None:
    """Return by how much the second is better in the primary outcome, over the seeds that both have."""
    if grid.primary == ANSWER_LOGPROB:
        pair = common_scores(before, after)
        return paired_difference(pair[0].log_odds, pair[1].log_odds) if pair else None
    seeds = [seed for seed in before.seeds if seed in after.seeds]
    if not seeds:
        return None
    one, two = (dict(zip(result.seeds, result.losses, strict=True)) for result in (before, after))
    return paired_over_seeds([-one[seed] for seed in seeds], [-two[seed] for seed in seeds])


def common_scores(before: MethodResult, after: MethodResult) -> tuple[Scores, Scores] | None:
    """Return the scores of the seeds that both have."""
    seeds = [seed for seed in before.seeds if seed in after.seeds]
    if not (seeds and before.scores and after.scores):
        return None
    return (
        before.scores.of_seeds([before.seeds.index(seed) for seed in seeds]),
        after.scores.of_seeds([after.seeds.index(seed) for seed in seeds]),
    )


def _taus(
    grid: Grid, outcome: Outcome, losses: Losses, results: Sequence[MethodResult]
) -> list[tuple[float, float, str]]:
    """Return for each common rate what it alone would have said, after the first rung, which all trials reached."""
    final = {result.contender.label: result.loss for result in results if result.loss is not None}
    found = []
    for rate, at in common_rates(losses, outcome.trials, grid.rules.rungs[0]):
        tau = kendall_tau(at, final)
        if tau is not None:
            found.append((rate, tau, min(at, key=lambda label: at[label])))
    return found


def plain(value: Any) -> Any:
    """Return a number for JSON and CSV: None where it is not finite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
