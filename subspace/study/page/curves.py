"""The panels of a study's page over rates and over steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from subspace.common.tables import Grid
from subspace.reporting.page import charts
from subspace.reporting.page.charts import STYLES, Axis, Curve, Standing
from subspace.reporting.page.document import NARROW, Key, Panel
from subspace.reporting.page.figure import Figure, rate_number
from subspace.study.page.common import Rows, listed, several
from subspace.study.results import StudyResult
from subspace.study.search import common_rates

#: Sizes of charts in pixels: of one of many, of one of few, and the height of a whole one.
SMALL, LARGER, HEIGHT = (164.0, 128.0), (344.0, 220.0), 320.0


def _styles(result: StudyResult) -> dict[str, int | None]:
    """Return which methods stand out: all if they are few; else the reference, the best, and the best at one rate."""
    labels = [method.contender.label for method in result.methods]
    first = [first for _, _, first in sorted(result.taus, key=lambda found: found[1])]
    wanted = list(dict.fromkeys([result.grid.reference, *labels[:1], *first[:1], *labels]))
    chosen = wanted if len(labels) <= len(STYLES) else wanted[:4]
    return {label: chosen.index(label) if label in chosen else None for label in labels}


def _keys(styles: Mapping[str, int | None]) -> tuple[Key, ...]:
    shown = sorted((number, label) for label, number in styles.items() if number is not None)
    keys = [Key(STYLES[number], f"c{number}", label) for number, label in shown]
    others = len(styles) - len(shown)
    return (*keys, Key("circle", "muted", f"{others} others")) if others else tuple(keys)


def _bounded(groups: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Return the finite losses, without those far above where every method has half of its own: they hide the rest."""
    known = [sorted(loss for loss in group if math.isfinite(loss)) for group in groups]
    known = [group for group in known if group]
    if not known:
        return (0.0, 1.0)
    low, middle = min(group[0] for group in known), max(group[(len(group) - 1) // 2] for group in known)
    top = middle + (middle - low)
    kept = [loss for group in known for loss in group if loss <= top]
    return tuple(kept)


class _Searched(NamedTuple):
    """A method's losses by rate after a rung; of several trials at a rate, the best."""

    label: str
    by_rung: dict[int, dict[float, float]]
    best: float | None
    edge: str | None


def _searched(result: StudyResult) -> list[_Searched]:
    found = []
    for method in result.methods:
        label, by_rung = method.contender.label, {}
        for rung in result.grid.rules.rungs:
            at: dict[float, float] = {}
            for trial in result.outcome.trials[label]:
                loss = result.losses.get((label, trial, rung))
                if loss is not None:
                    at[trial.rate] = min(loss, at.get(trial.rate, math.inf))
            by_rung[rung] = dict(sorted(at.items()))
        found.append(_Searched(label, by_rung, method.best.rate if method.best else None, method.edge))
    return found


def _rate_curve(one: _Searched, rung: int, style: int | None, kind: str = "") -> Curve:
    points = tuple(one.by_rung[rung].items())
    rates = [rate for rate, _ in points]
    chosen = rates.index(one.best) if one.best in rates and kind != "faint" else None
    return Curve(one.label, points, style, chosen, one.edge, kind)


def rates(result: StudyResult) -> Iterator[Panel]:
    """Yield the losses over rates: of all methods after the first rung, both orders, and of each after every rung."""
    searched = [one for one in _searched(result) if any(one.by_rung.values())]
    if not searched:
        return
    rungs, styles = result.grid.rules.rungs, _styles(result)
    every = tuple(rate for one in searched for at in one.by_rung.values() for rate in at)
    x = Axis("learning rate", every, log=True, name=rate_number)
    drawn = [_rate_curve(one, rungs[0], styles[one.label]) for one in searched if one.by_rung[rungs[0]]]
    first = Axis(f"held-out loss after {rungs[0]} steps", _bounded([[y for _, y in c.points] for c in drawn]))
    best = [f"{one.label} at {rate_number(one.best)}" for one in searched if one.best is not None]
    summary = f"Held-out loss against learning rate, a line a method. Chosen: {listed(best)}."
    yield Panel(
        title="Loss against learning rate",
        note=f"After {rungs[0]} steps, which every trial had. Ring: the chosen rate; with an arrow, it lies at an end "
        "of its ladder and a better one may lie beyond. At the top edge: beyond the axis (triangle); failed (cross).",
        figures=several(1, lambda width: charts.curves("Loss against rate", summary, drawn, x, first, (width, HEIGHT))),
        data=_rate_grid(searched, rungs),
        legend=_keys({one.label: styles[one.label] for one in searched}),
    )
    yield from _orders(result)
    yield from _taus(result)
    if len(searched) > len(STYLES) or len(rungs) > 1:
        yield _small_rates(result, searched, x)


def _small_rates(result: StudyResult, searched: Sequence[_Searched], x: Axis) -> Panel:
    rungs = result.grid.rules.rungs
    y = Axis("held-out loss", _bounded([list(at.values()) for one in searched for at in one.by_rung.values() if at]))
    reference = next((m.searched for m in result.methods if m.contender.label == result.grid.reference), None)
    level = reference if reference is not None and math.isfinite(reference) else None

    def draw(one: _Searched) -> Figure:
        reached = [rung for rung in rungs if one.by_rung[rung]]
        lines = [_rate_curve(one, rung, 0, "" if rung == reached[-1] else "faint") for rung in reached]
        chosen = "no rate chosen yet" if one.best is None else f"chosen: {rate_number(one.best)}"
        size = SMALL if len(searched) > 3 else LARGER
        return charts.curves(
            f"{one.label}: loss against rate", f"{chosen}.", lines, x, y, size, heading=one.label, level=level
        )

    steps = ", ".join(map(str, rungs))
    note = f"Held-out loss against learning rate, a line for each rung: after {steps} steps, the last one strong."
    if level is not None:
        note += f" Dotted: the best of {result.grid.reference}."
    return Panel("Each method's search", note, tuple(map(draw, searched)), _rate_grid(searched, rungs), small=True)


def _rate_grid(searched: Sequence[_Searched], rungs: Sequence[int]) -> Grid:
    rows = []
    for one in searched:
        for rate in sorted({rate for at in one.by_rung.values() for rate in at}):
            losses = [_loss(one.by_rung[rung].get(rate)) for rung in rungs]
            chosen = "" if rate != one.best else f"chosen, {one.edge} end" if one.edge else "chosen"
            rows.append((one.label, rate_number(rate), *losses, chosen))
    return Grid("", ("method", "rate", *(f"loss after {rung}" for rung in rungs), ""), tuple(rows))


def _loss(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}" if math.isfinite(loss) else "failed"


def _orders(result: StudyResult) -> Iterator[Panel]:
    """Yield the order at the rate that says least of the tuned one, beside that."""
    if not result.taus:
        return
    rate, tau, _ = min(result.taus, key=lambda found: found[1])
    rung = result.grid.rules.rungs[0]
    at = next(found for one, found in common_rates(result.losses, result.outcome.trials, rung) if one == rate)
    tuned = [m.contender.label for m in result.methods if m.loss is not None and m.contender.label in at]
    before = sorted(tuned, key=lambda label: at[label])
    rows = [Standing(label, before.index(label) + 1, number + 1) for number, label in enumerate(tuned)]
    if len(rows) < 2:
        return
    heads = (f"at {rate_number(rate)} for all", "tuned")
    summary = f"Two orders of {len(rows)} methods: at {rate_number(rate)} {before[0]} is first, tuned it is {tuned[0]}."
    yield Panel(
        title="What one learning rate would have said",
        note=f"The order by held-out loss after {rung} steps at {rate_number(rate)} for all, and by the finals, each "
        f"method at its own rate. Kendall's tau {tau:.2f}; 1 would be the same order.",
        figures=tuple(charts.orders("Two orders", summary, heads, rows, width) for width in (NARROW, 528.0)),
        data=Grid("", ("method", *heads), tuple((row.label, str(row.before), str(row.after)) for row in rows)),
        legend=(Key("up", "better", "moves up by being tuned"), Key("down", "worse", "moves down")),
        across=2,
    )


def _taus(result: StudyResult) -> Iterator[Panel]:
    """Yield how much the order at each common rate agrees with the tuned one."""
    if not result.taus:
        return
    curve = Curve("Kendall's tau", tuple((rate, tau) for rate, tau, _ in result.taus), 0)
    x = Axis("learning rate", tuple(rate for rate, _ in curve.points), log=True, name=rate_number)
    y = Axis("Kendall's tau with the tuned order", (-1.0, 0.0, 1.0))
    told = ", ".join(f"{tau:.2f} at {rate_number(rate)}" for rate, tau in curve.points)
    yield Panel(
        title="Agreement with the tuned order",
        note="Kendall's tau of each rate that at least half of the methods tried: 1 is the same order, 0 says nothing "
        "of it.",
        figures=several(
            2, lambda width: charts.curves("Agreement", f"{told}.", [curve], x, y, (width, HEIGHT), level=0.0)
        ),
        data=Grid(
            "",
            ("rate", "tau", "first at this rate"),
            tuple((rate_number(rate), f"{tau:.3f}", first) for rate, tau, first in result.taus),
        ),
        across=2,
    )


def training(result: StudyResult, curve_rows: Rows) -> Iterator[Panel]:
    """Yield the finals' held-out losses over steps: means of all methods, and each method's seeds."""
    by_seed: dict[str, dict[int, dict[int, float]]] = {}
    for row in curve_rows:
        if row["phase"] == "final":
            loss = row["validation_loss"]
            of_seed = by_seed.setdefault(row["method"], {}).setdefault(row["seed"], {})
            of_seed[row["step"]] = math.inf if loss is None else loss
    labels = [m.contender.label for m in result.methods if m.contender.label in by_seed]
    if not labels:
        return
    styles = _styles(result)
    means = [Curve(label, tuple(_mean_curve(by_seed[label])), styles[label]) for label in labels]
    means = [curve for curve in means if curve.points]
    x = Axis("step", tuple(step for label in labels for one in by_seed[label].values() for step in one))
    y = Axis("held-out loss", _bounded([[value for _, value in curve.points] for curve in means]))
    ends = [f"{curve.label} {curve.points[-1][1]:.3f}" for curve in means]
    summary = f"Held-out loss of the finals over steps, means over seeds. At the end: {listed(ends)}."
    if means:
        yield Panel(
            title="Training",
            note="Held-out loss of the finals, each at its method's chosen rate: means over the seeds.",
            figures=several(1, lambda width: charts.curves("Training", summary, means, x, y, (width, HEIGHT))),
            data=_training_grid(labels, by_seed),
            legend=_keys({curve.label: curve.style for curve in means}),
        )
    if len(labels) > len(STYLES):
        yield _small_training(result, labels, by_seed, x, y)


def _mean_curve(by_seed: Mapping[int, Mapping[int, float]]) -> Iterator[tuple[float, float]]:
    """Yield the mean at the steps that all seeds reached."""
    for step in sorted(set.intersection(*(set(one) for one in by_seed.values()))):
        yield step, sum(one[step] for one in by_seed.values()) / len(by_seed)


def _small_training(
    result: StudyResult,
    labels: Sequence[str],
    by_seed: Mapping[str, Mapping[int, Mapping[int, float]]],
    x: Axis,
    y: Axis,
) -> Panel:
    level = next((m.loss for m in result.methods if m.contender.label == result.grid.reference), None)
    values = tuple(v for label in labels for one in by_seed[label].values() for v in one.values() if v <= max(y.values))
    y = replace(y, values=values)

    def draw(label: str) -> Figure:
        lines = [
            Curve(f"{label}, seed {seed}", tuple(sorted(one.items())), 0, kind="faint")
            for seed, one in by_seed[label].items()
        ]
        title = f"{label}: training"
        return charts.curves(title, f"{len(lines)} seeds.", lines, x, y, SMALL, heading=label, level=level)

    note = f"Held-out loss over steps, a line a seed. Dotted: the mean of {result.grid.reference} at the end."
    figures = tuple(draw(label) for label in labels)
    return Panel("Each method's finals", note, figures, _training_grid(labels, by_seed), small=True)


def _training_grid(labels: Sequence[str], by_seed: Mapping[str, Mapping[int, Mapping[int, float]]]) -> Grid:
    steps = sorted({step for label in labels for one in by_seed[label].values() for step in one})
    rows = tuple(
        (label, str(seed), *(_loss(one.get(step)) for step in steps))
        for label in labels
        for seed, one in sorted(by_seed[label].items())
    )
    return Grid("", ("method", "seed", *(f"step {step}" for step in steps)), rows)
