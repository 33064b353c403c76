"""A study's table, and the sentences that it must be read with."""

from __future__ import annotations

import statistics as plain_statistics
from collections.abc import Iterator, Sequence
from typing import Any

from subspace.common import tables
from subspace.reporting.continuous import smallest_difference
from subspace.reporting.retention import KEPT, Kept
from subspace.reporting.statistics import ALPHA, POWER, detectable_difference
from subspace.study.config import ANSWER_LOGPROB
from subspace.study.results import MethodResult, StudyResult, plain

ARROWS = {"low": "↓", "high": "↑"}
NONE = "-"


def report_grid(result: StudyResult) -> tables.Grid:
    """Return the table: a row a method, the best held-out loss first."""
    grid = result.grid
    scored = grid.primary == ANSWER_LOGPROB
    head = ["method", "size", "trained", "best rate", "edge", "valid. loss", f"{unit(result)} vs {grid.reference}"]
    head += ["accuracy"] if scored and "accuracy" in grid.also else []
    head += [KEPT] if _kept(result) else []
    head += [f"s/step x {grid.reference}", "MB", "groups"]
    rows = tuple(_row(result, method) for method in result.methods)
    return tables.Grid(_title(result), tuple(head), rows, tuple(sentences(result)), left=2)


def _title(result: StudyResult) -> str:
    grid = result.grid
    trials = sum(len(tried) for tried in result.outcome.trials.values())
    finals = sum(len(method.seeds) for method in result.methods)
    return (
        f"study {grid.name}: {len(grid.contenders)} methods, {trials} trials, {finals} finals, budget "
        f"{grid.budget:,} ± {100 * grid.within:g} %"
    )


def unit(result: StudyResult) -> str:
    """Return what differences from the reference are measured in."""
    return "log-odds" if result.grid.primary == ANSWER_LOGPROB else "lower loss"


def _row(result: StudyResult, method: MethodResult) -> tuple[str, ...]:
    contender, grid = method.contender, result.grid
    size = "{} {}".format(*contender.size) if contender.size else ""
    mark = " *" if contender.off else ""
    rate = NONE if method.best is None else f"{method.best.rate:.2g}" + _axes(method)
    cells = [contender.label, size, f"{contender.trained:,}{mark}", rate, ARROWS.get(method.edge or "", "")]
    cells += [_loss(method), _against(method)]
    if grid.primary == ANSWER_LOGPROB and "accuracy" in grid.also:
        a = method.accuracy
        cells.append(NONE if a is None else f"{100 * a.value:.1f} [{100 * a.low:.1f}, {100 * a.high:.1f}]")
    if _kept(result):
        cells.append(NONE if method.kept is None else str(method.kept))
    reference = result.method(grid.reference).seconds
    relative = method.seconds / reference if method.seconds and reference else None
    cells += [NONE if relative is None else f"{relative:.2f}", f"{method.memory / 1e6:,.0f}" if method.memory else NONE]
    return (*cells, method.group)


def _kept(result: StudyResult) -> Kept | None:
    """Return the first method's retention that was measured; None if none was."""
    return next((method.kept for method in result.methods if method.kept), None)


def _axes(method: MethodResult) -> str:
    return "".join(f", {name} {value}" for name, value in (method.best.axes if method.best else ()))


def _loss(method: MethodResult) -> str:
    if method.loss is None:
        return NONE
    spread = f" ± {plain_statistics.stdev(method.losses):.3f}" if len(method.losses) > 1 else ""
    return f"{method.loss:.3f}{spread}"


def _against(method: MethodResult) -> str:
    d = method.against
    if d is None:
        return NONE
    mark = {"better": f" {tables.BEST}", "worse": " ▽", "": ""}[method.verdict]
    return f"{d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}]{mark}"


def sentences(result: StudyResult) -> Iterator[str]:
    """Yield what the table must be read with."""
    grid, methods = result.grid, result.methods
    if not result.outcome.ended:
        yield f"the search goes on: {len(result.outcome.due)} trainings are due; nothing here is final"
    for method in methods:
        if 0 < len(method.seeds) < len(grid.final_seeds):
            yield f"{method.contender.label}: {len(method.seeds)} of {len(grid.final_seeds)} finals"
    if off := [f"{m.contender.label} ({m.contender.off})" for m in methods if m.contender.off]:
        yield f"* not at the budget: {'; '.join(off)}"
    if edges := [f"{m.contender.label} {ARROWS[m.edge]}" for m in methods if m.edge]:
        yield f"the best rate lies at the end of the ladder, so a better one may lie beyond: {', '.join(edges)}"
    if failed := [f"{m.contender.label} {m.failed}" for m in methods if m.failed]:
        yield f"trainings that failed, and count as the worst: {', '.join(failed)}"
    yield from curse(methods)
    yield from one_rate(result)
    yield from smallest(result)
    if kept := _kept(result):
        yield kept.note
    seeds = max((len(method.seeds) for method in methods), default=0)
    if seeds == 1:
        yield "one seed: the differences hold for these runs, not for the methods"
    yield (
        f"{tables.BEST} better and ▽ worse than {grid.reference} (p < {ALPHA} after Holm"
        + (", accuracy not in the other direction" if grid.primary == ANSWER_LOGPROB else "")
        + "); methods that share a letter are not told apart (Holm over all pairs)"
    )
    yield (
        "the search was judged by held-out training rows, never by the items; the finals have other seeds, the same "
        "rows in the same order for every method of a seed"
    )


def curse(methods: Sequence[MethodResult]) -> Iterator[str]:
    """Yield how much the search's best flatters, by the finals."""
    gaps = [m.loss - m.searched for m in methods if m.loss is not None and m.searched is not None]
    if gaps:
        mean = sum(gaps) / len(gaps)
        yield f"winner's curse: the finals' losses are {mean:+.3f} beside the search's best, on average over methods"


def one_rate(result: StudyResult) -> Iterator[str]:
    """Yield what one learning rate for all would have said."""
    if result.taus:
        taus = ", ".join(f"{tau:.2f} at {rate:.2g}" for rate, tau, _ in result.taus)
        rung = result.grid.rules.rungs[0]
        yield f"tuned order against the order at one rate for all, after {rung} steps (Kendall's tau): {taus}"
        rate, _, first = min(result.taus, key=lambda found: found[1])
        best = next((m.contender.label for m in result.methods if m.loss is not None), "")
        if best and first != best:
            yield f"at {rate:.2g} for all, {first} would be first; tuned, it is {best}"


def smallest(result: StudyResult) -> Iterator[str]:
    """Yield the smallest difference that the finals could show."""
    scored = [method for method in result.methods if method.scores]
    if not (result.spreads and scored and scored[0].scores):
        return
    items, seeds = scored[0].scores.items, min(len(method.seeds) for method in scored)
    found = [smallest_difference(known, items, seeds) for known in result.spreads]
    known = [value for value in found if value is not None]
    runs = sum(len(method.seeds) for method in scored)
    if known:
        points = detectable_difference(items)
        also = "" if points is None else f", {100 * points:.1f} points of accuracy for one seed each"
        yield (
            f"smallest difference that these {runs} runs could show against {result.grid.reference}: "
            f"{plain_statistics.median(known):.3f} log-odds (median over methods, power {100 * POWER:.0f} %){also}"
        )


def as_dict(result: StudyResult) -> dict[str, Any]:
    """Return the results as JSON values."""
    return {
        "study": result.grid.name,
        "ended": result.outcome.ended,
        "budget": result.grid.budget,
        "reference": result.grid.reference,
        "methods": [_method_dict(method) for method in result.methods],
        "one_rate": [{"rate": rate, "tau": tau, "first": first} for rate, tau, first in result.taus],
        "notes": list(sentences(result)),
    }


def _method_dict(method: MethodResult) -> dict[str, Any]:
    contender, against = method.contender, method.against
    return {
        "method": contender.label,
        "size": dict([contender.size]) if contender.size else None,
        "trained": contender.trained,
        "off_budget": contender.off,
        "rate": method.best.rate if method.best else None,
        "axes": dict(method.best.axes) if method.best else {},
        "edge": method.edge,
        "search_loss": plain(method.searched),
        "seeds": list(method.seeds),
        "losses": [plain(loss) for loss in method.losses],
        "difference": {name: plain(value) for name, value in against._asdict().items()} if against else None,
        "p_holm": method.corrected,
        "verdict": method.verdict,
        "accuracy": method.accuracy._asdict() if method.accuracy else None,
        KEPT: {n: plain(v) for n, v in method.kept.more._asdict().items()}
        if method.kept and method.kept.more
        else None,
        "seconds_a_step": method.seconds,
        "peak_memory": method.memory,
        "groups": method.group,
        "failed": method.failed,
    }
