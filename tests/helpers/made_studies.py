"""Results of studies that nobody trained: losses by a formula, items by a draw, for pages and tables of any size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from subspace.reporting.continuous import paired_difference
from subspace.reporting.retention import Kept
from subspace.reporting.statistics import estimate
from subspace.study import results
from subspace.study.config import ANSWER_LOGPROB, VALIDATION_LOSS
from subspace.study.grid import Contender, Grid
from subspace.study.results import MethodResult, Scores, StudyResult
from subspace.study.search import Rules, Trial, common_rates, kendall_tau, round_rate, search

LADDER = [round_rate(1e-3 * 10 ** (power / 2)) for power in range(-2, 3)]
METHODS = [
    "lora", "adalora", "bitfit", "dora", "flexlora", "flora", "full", "houlsby", "ia3", "liera", "lora-dash", "milora",
    "moslora", "p-tuning", "parallel", "pfeiffer", "pissa", "prefix", "prompt", "sam-parser", "series", "spectral",
    "ssb", "ssl", "svdiff", "trilora",
]  # fmt: skip
#: Names as somebody might give them to break a page: markup, quotes, another direction, signs of pictures, length.
HOSTILE = [
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(2)'>",
    "]]></svg><style>*{display:none}",
    "שלום-עולם",
    "العربية مرحبا بالعالم",
    "\u202egnitirw",
    "👩‍🔬🧪🎉🎉🎉🎉",
    "W" * 200,
    "a b\n\tc\x00d",
    "&amp;&lt;{{ 7 * 7 }}{% raw %}",
    "ﷺﷺﷺ漢字漢字漢字",
    "javascript:alert(3)",
]

Row = dict[str, Any]
Made = tuple[StudyResult, list[Row], list[Row]]


def made_study(
    labels: Sequence[str] = METHODS,
    *,
    seeds: int = 3,
    items: int = 60,
    scored: bool = True,
    ended: bool = True,
    name: str = "made",
    folder: Path = Path("runs"),
) -> Made:
    """Return a study's results, the rows of its cells, and the rows of its curves."""
    rules = Rules((12, 24, 60), 0.5, 3.1623)
    draw = np.random.default_rng(7)
    optima = {label: draw.uniform(-3.6, -1.9) for label in labels}
    optima[labels[1]] = -0.9  # beyond its ladder
    floors = {label: 2.4 + 0.4 * draw.random() for label in labels}
    planned = {label: tuple(Trial(rate) for rate in LADDER) for label in labels}
    losses: dict[tuple[str, Trial, int], float] = {}

    def loss(label: str, rate: float, step: int) -> float:
        off = math.log10(rate) - optima[label]
        if off > 1.6:
            return math.inf
        return float(floors[label] + 12 / (step + 8) + 0.7 * off**2 + (3.0 * (off - 1) if off > 1 else 0))

    outcome = search(planned, losses, rules)
    while outcome.due and (ended or len(losses) < len(labels)):
        losses |= {(job.method, job.trial, job.step): loss(job.method, job.trial.rate, job.step) for job in outcome.due}
        outcome = search(planned, losses, rules)
    contenders = [_contender(label, number, planned[label]) for number, label in enumerate(labels)]
    grid = Grid(
        name=name, runs=str(folder), base="launch/recipes/quickstart.yaml", overrides=(),
        shared={"model": {"path": "smollm2-135m"}, "train": {"steps": 60}, "data": {"validation": 120}},
        budget=1_658_880, within=0.02, rules=rules, search_seeds=(100,), final_seeds=tuple(range(seeds)),
        reference=labels[0], primary=ANSWER_LOGPROB if scored else VALIDATION_LOSS,
        also=("accuracy", "validation_loss"), passages=None, contenders=tuple(contenders),
    )  # fmt: skip
    hard = draw.normal(0, 2, items)
    methods, cells, curves = [], [], []
    for number, contender in enumerate(contenders):
        label, best = contender.label, outcome.best.get(contender.label)
        for trial in outcome.trials[label]:
            cells.append(_cell(label, "search", trial, 100, contender.trained, 0.5, 10**9))
        if best is None:
            methods.append(MethodResult(contender, None, None, None))
            continue
        seconds = [0.5 + 0.03 * number + 0.02 * draw.random() for _ in range(seeds)]
        memory = int(1e9 + 4e7 * ((number * 7) % 13))
        finals = [loss(label, best.rate, 60) + 0.01 * draw.normal() + 0.01 for _ in range(seeds)]
        for seed in range(seeds):
            cells.append(_cell(label, "final", best, seed, contender.trained, seconds[seed], memory))
            curves += [
                _point(label, best, seed, step, loss(label, best.rate, step) + 0.02 * draw.normal())
                for step in range(12, 61, 12)
            ]
        scores = None
        if scored:
            gain = 2 * (2.8 - finals[0])
            odds = np.stack([hard + gain + draw.normal(0, 0.5, items) for _ in range(seeds)])
            scores = Scores([odds], [(odds > 0).astype(float)], ("openbookqa",))
        methods.append(
            replace(
                MethodResult(contender, best, outcome.edges.get(label), losses[label, best, 60]),
                seeds=tuple(range(seeds)),
                losses=tuple(finals),
                scores=scores,
                accuracy=estimate(scores.correct) if scores else None,
                seconds=float(np.median(seconds)),
                memory=memory,
                kept=_kept(draw, seeds) if scored else None,
            )
        )
    compared, spreads = results.compared(grid, methods)
    compared.sort(key=lambda method: math.inf if method.loss is None else method.loss)
    taus = _taus(outcome.trials, losses, compared, rules.rungs[0])
    return StudyResult(grid, outcome, losses, tuple(compared), tuple(taus), spreads), cells, curves


def _taus(trials: Any, losses: Any, methods: Sequence[MethodResult], rung: int) -> list[tuple[float, float, str]]:
    final = {method.contender.label: method.loss for method in methods if method.loss is not None}
    found = []
    for rate, at in common_rates(losses, trials, rung):
        tau = kendall_tau(at, final)
        if tau is not None:
            found.append((rate, tau, min(at, key=lambda label: at[label])))
    return found


def _kept(draw: np.random.Generator, seeds: int) -> Kept:
    differences = draw.normal(0.02 * draw.random(), 0.02, (seeds, 40))
    return Kept(40, 1.02, [differences], paired_difference([0 * differences], [differences]), "")


def _contender(label: str, number: int, trials: tuple[Trial, ...]) -> Contender:
    trained = 1_658_880 if number % 3 else 1_658_880 // (number + 1)
    off = "" if trained == 1_658_880 else f"{trained / 1_658_880:.3g} x budget, as large as it is"
    settings: Mapping[str, Any] = {"r": 8} if number % 3 else {}
    return Contender(label, "lora", settings, True, ("r", 8) if settings else None, trained, off, 1.0, 0, trials)


def _cell(label: str, phase: str, trial: Trial, seed: int, trained: int, seconds: float, memory: int) -> Row:
    return {
        "method": label, "phase": phase, "trial": f"rate-{trial.rate:g}", "rate": trial.rate, "seed": seed,
        "trained": trained, "steps": 60, "state": "finished", "seconds": 60 * seconds, "seconds_a_step": seconds,
        "peak_memory": memory,
    }  # fmt: skip


def _point(label: str, trial: Trial, seed: int, step: int, loss: float) -> Row:
    return {
        "method": label, "phase": "final", "trial": f"rate-{trial.rate:g}", "rate": trial.rate, "seed": seed,
        "step": step, "validation_loss": loss,
    }  # fmt: skip


def renamed(made: Made, names: Mapping[str, str]) -> Made:
    """Return made results with other names of methods, whatever characters those have."""
    result, cells, curves = made

    def new(label: str) -> str:
        return names.get(label, label)

    contenders = {c.label: replace(c, label=new(c.label)) for c in result.grid.contenders}
    grid = replace(result.grid, contenders=tuple(contenders.values()), reference=new(result.grid.reference))
    outcome = replace(
        result.outcome,
        trials={new(label): trials for label, trials in result.outcome.trials.items()},
        best={new(label): trial for label, trial in result.outcome.best.items()},
        edges={new(label): side for label, side in result.outcome.edges.items()},
    )
    losses = {(new(label), trial, step): loss for (label, trial, step), loss in result.losses.items()}
    methods = tuple(replace(m, contender=contenders[m.contender.label]) for m in result.methods)
    taus = tuple((rate, tau, new(first)) for rate, tau, first in result.taus)
    rows = [[{**row, "method": new(row["method"])} for row in some] for some in (cells, curves)]
    return StudyResult(grid, outcome, losses, methods, taus, result.spreads), rows[0], rows[1]
