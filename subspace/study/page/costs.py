"""The panels of scores against costs on a study's page, with their Pareto fronts."""

from __future__ import annotations

import statistics as plain_statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from subspace.common.tables import Grid
from subspace.reporting.fronts import drawn_means, front_shares, on_front
from subspace.reporting.page import charts
from subspace.reporting.page.charts import Axis, Cloud, Point
from subspace.reporting.page.document import Key, Panel
from subspace.reporting.page.figure import large_number
from subspace.reporting.statistics import LEVEL, Array, Run
from subspace.study.config import ANSWER_LOGPROB
from subspace.study.page.common import Rows, listed, several
from subspace.study.results import MethodResult, StudyResult


class _Score(NamedTuple):
    """A method's score, its interval, and its bootstrap draws."""

    value: float
    low: float
    high: float
    draws: Array


class _Cost(NamedTuple):
    """A cost: its axis, and each method's, by label; bootstrap draws of those that differ between seeds."""

    title: str
    label: str
    name: Callable[[float], str]
    values: dict[str, float]
    runs: dict[str, Run]


def fronts(result: StudyResult, cell_rows: Rows) -> Iterator[Panel]:
    """Yield the scores against each cost, with the front and how surely each method is on it."""
    scores = _scores(result)
    costs = [cost for cost in _costs(result, cell_rows) if len(cost.values.keys() & scores.keys()) > 1]
    across = 2 if len(costs) % 3 else 3
    for cost in costs:
        yield _front(result, cost, scores, across)


def _scores(result: StudyResult) -> dict[str, _Score]:
    """Return the finals' scores in the primary outcome; more is better, so losses are negative."""
    methods = [m for m in result.methods if (m.scores if _answers(result) else m.losses)]
    runs = [_run(method, answers=_answers(result)) for method in methods]
    if not runs:
        return {}
    draws = drawn_means(runs)
    found = {}
    for number, (method, run) in enumerate(zip(methods, runs, strict=True)):
        value = float(np.mean([task.mean() for task in run]))
        low, high = np.quantile(draws[:, number], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        found[method.contender.label] = _Score(value, float(low), float(high), draws[:, number])
    return found


def _answers(result: StudyResult) -> bool:
    return result.grid.primary == ANSWER_LOGPROB and any(method.scores for method in result.methods)


def _run(method: MethodResult, *, answers: bool) -> Run:
    if answers and method.scores:
        return method.scores.log_odds
    return [-np.array(method.losses, dtype=float)[:, None]]


def _costs(result: StudyResult, cell_rows: Rows) -> Iterator[_Cost]:
    methods = result.methods
    trained = {m.contender.label: float(m.contender.trained) for m in methods if m.contender.trained > 0}
    yield _Cost("Score against trained numbers", "trained numbers", large_number, trained, {})
    seconds: dict[str, list[float]] = {}
    for row in cell_rows:
        if row["phase"] == "final" and row.get("seconds_a_step"):
            seconds.setdefault(row["method"], []).append(float(row["seconds_a_step"]))
    medians = {label: plain_statistics.median(values) for label, values in seconds.items()}
    runs: dict[str, Run] = {label: [np.array(values)[:, None]] for label, values in seconds.items()}
    yield _Cost("Score against time", "seconds a step", lambda value: f"{value:.3g}", medians, runs)
    memory = {m.contender.label: m.memory / 1e6 for m in methods if m.memory}
    yield _Cost("Score against memory", "peak memory in MB", lambda value: f"{value:,.0f}", memory, {})
    kept = {m.contender.label: m.kept for m in methods if m.kept and m.kept.more}
    more = {label: one.more.value for label, one in kept.items() if one.more}
    drawn = {label: one.differences for label, one in kept.items()}
    yield _Cost(
        "Score against retention", "bits per byte more than the base", lambda value: f"{value:+.3f}", more, drawn
    )


def _front(result: StudyResult, cost: _Cost, scores: Mapping[str, _Score], across: int) -> Panel:
    labels = [label for label in scores if label in cost.values]
    values = np.array([scores[label].value for label in labels])
    at = np.array([cost.values[label] for label in labels])
    draws = np.stack([scores[label].draws for label in labels], axis=1)
    drawn_costs = drawn_means([cost.runs[label] for label in labels]) if cost.runs else at
    varied = bool(np.ptp(draws, axis=0).any())
    shares = front_shares(draws, drawn_costs) if varied else [None] * len(labels)
    answers = _answers(result)
    sign = 1.0 if answers else -1.0
    what = "log-odds of the right answer" if answers else "held-out loss"
    flags = on_front(values, at)
    points = []
    for label, flag, share in zip(labels, flags, shares, strict=True):
        score, price = scores[label], cost.values[label]
        low, high = sorted((sign * score.low, sign * score.high))
        told = f"{what} {sign * score.value:.3f}, {cost.label} {cost.name(price)}"
        told += "" if share is None else f", on the front in {100 * share:.0f} % of draws"
        points.append(Point(label, price, sign * score.value, low, high, bool(flag), share, told))
    x = Axis(
        cost.label,
        tuple(cost.values[label] for label in labels),
        log=bool(at.min() > 0 and at.max() > 8 * at.min()),
        name=cost.name,
    )
    y = Axis(f"{what}{'' if answers else ' (less is better, upwards)'}", tuple(point.y for point in points))
    front = sorted((point for point in points if point.front), key=lambda point: point.x)
    summary = f"{what} against {cost.label}. On the front, the cheapest first: {listed([p.name for p in front])}."
    chart = Cloud(cost.title, summary, tuple(points), x, y, lower=not answers)
    share_note = "the number is the share of bootstrap draws (seeds x items) in which a method is on the front"
    return Panel(
        title=cost.title,
        note=f"Better is up and to the left; none beats those on the line in both; "
        f"{share_note if varied else 'one seed says nothing of how surely'}.",
        figures=several(across, lambda width: charts.cloud(chart, (width, 300.0))),
        data=_front_grid(points, cost, what),
        legend=(Key("diamond", "front", "on the front"), Key("circle", "behind", "behind it")),
        across=across,
    )


def _front_grid(points: Sequence[Point], cost: _Cost, what: str) -> Grid:
    rows = tuple(
        (
            point.label, cost.name(point.x), f"{point.y:.4f}", f"{point.low:.4f}", f"{point.high:.4f}",
            "yes" if point.front else "", "-" if point.share is None else f"{point.share:.3f}",
        )
        for point in points
    )  # fmt: skip
    return Grid("", ("method", cost.label, what, "low", "high", "on the front", "share of draws"), rows)
