"""The page of a study: its sections in order."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from subspace.common.foreign.yaml_files import format_value
from subspace.common.hashing import hash_json
from subspace.common.tables import Grid
from subspace.reporting.page.document import Finding, Page, Section, render
from subspace.reporting.page.figure import rate_number
from subspace.study.cells import axis_key
from subspace.study.page import costs, curves, effects
from subspace.study.page.common import Rows, listed
from subspace.study.record import grid_hash
from subspace.study.report import curse, one_rate, report_grid, sentences, smallest, unit
from subspace.study.results import MethodResult, StudyResult

#: Digits of a hash that a table shows.
DIGITS = 12


def study_page(
    result: StudyResult, cell_rows: Rows, curve_rows: Rows, made_with: Sequence[tuple[str, str]] = ()
) -> str:
    """Return the report of a study as HTML.

    Args:
        result: what its finished cells say.
        cell_rows: the rows of ``cells.csv``.
        curve_rows: the rows of ``curves.csv``.
        made_with: what the finals were made with: versions, devices, model and data.
    """
    made = [Grid("made with", ("what", "value"), tuple(made_with), left=2)] if made_with else []
    sections = (
        Section("findings", "What it found", _state(result), findings=tuple(_findings(result))),
        Section("effects", "Effects", panels=tuple(effects.effects(result))),
        Section("rates", "Learning rates", panels=tuple(curves.rates(result))),
        Section("training", "Training", panels=tuple(curves.training(result, curve_rows))),
        Section("costs", "Score and cost", panels=tuple(costs.fronts(result, cell_rows))),
        Section("table", "Table", grids=(report_grid(result),)),
        Section(
            "settings",
            "Settings",
            f"A hash is of all that decides a method's numbers; the study's is {grid_hash(result.grid)[:DIGITS]}.",
            grids=(_settings(result),),
            folded=(_shared(result), *made),
        ),
    )
    kept = tuple(s for s in sections if s.panels or s.grids or s.findings)
    return render(Page(f"Study {result.grid.name}", _lead(result), kept, tuple(_facts(result))))


def _lead(result: StudyResult) -> str:
    grid = result.grid
    judged = "the log-odds of the right answer" if unit(result) == "log-odds" else "the loss on held-out rows"
    return (
        f"{len(grid.contenders)} methods at one budget, each at the best of its own learning rates, trained anew with "
        f"fresh seeds and compared by {judged}."
    )


def _facts(result: StudyResult) -> Iterator[tuple[str, str]]:
    grid = result.grid
    yield "methods", str(len(grid.contenders))
    yield "trials", str(sum(len(tried) for tried in result.outcome.trials.values()))
    yield "finals", str(sum(len(method.seeds) for method in result.methods))
    yield "budget", f"{grid.budget:,} ± {100 * grid.within:g} %"
    yield "steps", str(grid.steps)
    yield "reference", grid.reference
    yield "final seeds", ", ".join(map(str, grid.final_seeds))


def _state(result: StudyResult) -> str:
    return next((note for note in sentences(result) if note.startswith("the search goes on")), "")


def _findings(result: StudyResult) -> Iterator[Finding]:
    reference = result.grid.reference
    labels = [method.contender.label for method in effects.by_effect(result)]
    groups = {method.contender.label: method.group for method in result.methods}
    if first := [label for label in labels if "a" in groups[label]]:
        text = "is ahead of all others" if len(first) == 1 else "are not told apart from the best"
        yield Finding("The best", f"{listed(first, 8)} {text}.")
    else:
        yield Finding("The best", "is not known yet: no two methods have finals that can be compared.")
    by_verdict: dict[str, list[str]] = {"better": [], "worse": [], "": []}
    for method in effects.by_effect(result):
        if method.against:
            by_verdict[method.verdict].append(method.contender.label)
    yield Finding(
        f"Against {reference}",
        f"Better: {listed(by_verdict['better'])}. Worse: {listed(by_verdict['worse'])}. Not told apart: "
        f"{listed(by_verdict[''])}.",
    )
    for title, found in (
        ("What one learning rate would have said", one_rate(result)),
        ("Winner's curse", curse(result.methods)),
        ("What these runs could show", smallest(result)),
    ):
        said = [sentence.removeprefix("winner's curse: ") for sentence in found]
        if said:
            yield Finding(title, " ".join(f"{sentence[:1].upper()}{sentence[1:]}." for sentence in said))


def _settings(result: StudyResult) -> Grid:
    head = ("method", "settings", "trained", "rates tried", "chosen", "search seeds", "final seeds", "hash")
    searched = ", ".join(map(str, result.grid.search_seeds))
    rows = []
    for method in result.methods:
        contender = method.contender
        settings = ", ".join(contender.overrides())
        tried = sorted({trial.rate for trial in result.outcome.trials[contender.label]})
        finals = ", ".join(map(str, method.seeds)) or "-"
        ends = " to ".join(dict.fromkeys(rate_number(rate) for rate in (tried[0], tried[-1])))
        trained = f"{contender.trained:,}{' *' if contender.off else ''}"
        about = (settings, trained, f"{len(tried)}: {ends}", _chosen(method), searched, finals)
        rows.append((contender.label, *about, _hash(result, method)))
    return Grid("settings of each method", head, tuple(rows), left=2)


def _chosen(method: MethodResult) -> str:
    if method.best is None:
        return "-"
    axes = [f"{axis_key(name)}={format_value(value)}" for name, value in method.best.axes]
    return ", ".join([rate_number(method.best.rate), *axes])


def _hash(result: StudyResult, method: MethodResult) -> str:
    """Return the hash of what decides a method's finals."""
    axes = dict(method.best.axes) if method.best else {}
    rate = method.best.rate if method.best else None
    decides = {"shared": result.grid.shared, "method": method.contender.overrides(), "rate": rate, "axes": axes}
    return hash_json(json.loads(json.dumps(decides, default=str)))[:DIGITS]


def _shared(result: StudyResult) -> Grid:
    grid = result.grid
    own = {"base": grid.base, "rungs": grid.rules.rungs, "keep": grid.rules.keep, "ladder's factor": grid.rules.step}
    rows = [*own.items(), *_flat("", grid.shared)]
    return Grid("settings that all runs share", ("setting", "value"), tuple((name, str(v)) for name, v in rows), left=2)


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}" if name else str(key), inner)
    else:
        yield name, value
