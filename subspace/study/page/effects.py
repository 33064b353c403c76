"""The panels of effects and accuracies on a study's page."""

from __future__ import annotations

import math
from collections.abc import Iterator

from subspace.common.tables import Grid
from subspace.reporting.page import charts
from subspace.reporting.page.charts import Dot
from subspace.reporting.page.document import Key, Panel
from subspace.reporting.statistics import LEVEL
from subspace.study.page.common import listed, several
from subspace.study.report import unit
from subspace.study.results import MethodResult, StudyResult


def effects(result: StudyResult) -> Iterator[Panel]:
    """Yield the differences from the reference with intervals and letters, and the accuracies, if there are any."""
    if not any(method.against for method in result.methods):
        return
    across = 2 if any(method.accuracy for method in result.methods) else 1
    yield _differences(result, across)
    if across == 2:
        yield _accuracies(result, across)


def _differences(result: StudyResult, across: int) -> Panel:
    reference, what = result.grid.reference, f"{unit(result)} vs {result.grid.reference}"
    rows = []
    for method in by_effect(result):
        label, d = method.contender.label, method.against
        if label == reference:
            rows.append(Dot(label, 0.0, 0.0, 0.0, "reference", method.group, "what the others are compared with"))
        elif d is None:
            rows.append(Dot(label, None, 0.0, 0.0, "same", "", "no finals yet"))
        else:
            told = f"{d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}]"
            rows.append(Dot(label, d.value, d.low, d.high, method.verdict or "same", method.group, told))
    kinds = {kind: [row.label for row in rows if row.kind == kind and row.value is not None] for kind in _KINDS}
    summary = (
        f"Differences from {reference} in {unit(result)} with {100 * LEVEL:.0f} % intervals. "
        f"Better: {listed(kinds['better'])}. Worse: {listed(kinds['worse'])}. Not told apart: {listed(kinds['same'])}."
    )
    return Panel(
        title=f"Effect: {what}",
        note=f"Dot: mean over finals; bar: {100 * LEVEL:.0f} % interval over seeds and items, not corrected. Letters: "
        "methods that share one are not told apart (Holm over all pairs).",
        figures=several(across, lambda width: charts.dots("Effects", summary, rows, what, width, zero=0.0)),
        data=_effect_grid(result),
        legend=tuple(
            Key(charts.DOT_SHAPES[kind], kind, text)
            for kind, text in _KINDS.items()
            if kinds[kind] or kind == "reference"
        ),
        across=across,
    )


_KINDS = {
    "better": "better (p < .05 after Holm)",
    "same": "not told apart",
    "worse": "worse (p < .05 after Holm)",
    "reference": "reference",
}


def by_effect(result: StudyResult) -> list[MethodResult]:
    """Return the methods, the largest difference from the reference first."""

    def standing(method: MethodResult) -> float:
        if method.contender.label == result.grid.reference:
            return 0.0
        return method.against.value if method.against else -math.inf

    return sorted(result.methods, key=standing, reverse=True)


def _effect_grid(result: StudyResult) -> Grid:
    rows = []
    for method in by_effect(result):
        d, p = method.against, method.corrected
        numbers = [f"{d.value:+.4f}", f"{d.low:+.4f}", f"{d.high:+.4f}"] if d else ["-"] * 3
        seeds = ", ".join(map(str, method.seeds))
        rows.append(
            (method.contender.label, *numbers, "-" if p is None else f"{p:.3g}", method.verdict, method.group, seeds)
        )
    return Grid("", ("method", "difference", "low", "high", "p (Holm)", "verdict", "groups", "seeds"), tuple(rows))


def _accuracies(result: StudyResult, across: int) -> Panel:
    methods = [method for method in by_effect(result) if method.accuracy]
    highest = max(method.accuracy.value for method in methods if method.accuracy)
    rows = []
    for method in methods:
        a = method.accuracy
        assert a is not None
        told = f"{100 * a.value:.1f} % [{100 * a.low:.1f}, {100 * a.high:.1f}]"
        kind = "best" if a.value == highest else "same"
        rows.append(Dot(method.contender.label, 100 * a.value, 100 * a.low, 100 * a.high, kind, "", told))
    best = max(rows, key=lambda row: row.value or 0.0)
    told = f"Highest: {best.label}, {best.told}."
    summary = f"Accuracy of {len(rows)} methods with intervals, in the order of their effects. {told}"
    numbers = [(row.label, f"{row.value:.2f}", f"{row.low:.2f}", f"{row.high:.2f}") for row in rows]
    return Panel(
        title="Accuracy",
        note=f"In %, mean over tasks, with {100 * LEVEL:.0f} % interval over seeds and items. Beside the effect, not "
        "in its place: an item counts here only once its answer flips.",
        figures=several(across, lambda width: charts.dots("Accuracy", summary, rows, "accuracy in %", width)),
        data=Grid("", ("method", "accuracy", "low", "high"), tuple(numbers)),
        legend=(Key("diamond", "best", "highest"),),
        across=across,
    )
