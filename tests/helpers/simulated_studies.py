"""Results of studies whose truth is known: scores drawn for each method, seed and item, and read as a study's are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, NamedTuple

import numpy as np

from subspace.reporting.statistics import Array
from subspace.study.config import ANSWER_LOGPROB
from subspace.study.grid import Contender, Grid
from subspace.study.results import MethodResult, Scores, StudyResult, compared
from subspace.study.search import Outcome, Rules, Trial

TRIAL = Trial(1e-3)


class Truth(NamedTuple):
    """Standard deviations of log-odds: of an item, of a method on an item with every seed, of a seed, of the rest."""

    hard: float = 2.0
    own: float = 0.3
    seeds: float = 0.05
    rest: float = 0.7

    def accuracy(self, gain: float) -> float:
        """Return the expected share of items with log-odds above 0, of a method with this gain."""
        sd = math.sqrt(self.hard**2 + self.own**2 + self.seeds**2 + self.rest**2)
        return 0.5 * (1 + math.erf(gain / sd / math.sqrt(2)))


TRUTH = Truth()


def simulated_grid(labels: tuple[str, ...], seeds: int) -> Grid:
    """Return the grid of a study of methods of which nothing but their labels is known; the first is the reference."""
    contenders = tuple(Contender(label, label, {}, True, None, 1, "", trials=(TRIAL,)) for label in labels)
    known: dict[str, Any] = {
        "name": "simulated", "rules": Rules((1,), 0.5), "search_seeds": (100,), "final_seeds": tuple(range(seeds)),
        "reference": labels[0], "primary": ANSWER_LOGPROB, "also": (), "contenders": contenders,
    }  # fmt: skip
    return Grid(**{**dict.fromkeys((field.name for field in fields(Grid)), None), **known})


def simulated_results(
    draw: np.random.Generator, gains: Mapping[str, float], seeds: int, items: list[int], truth: Truth = TRUTH
) -> StudyResult:
    """Return the finals of a study of methods with these true gains in log-odds, each item right above 0."""
    grid = simulated_grid(tuple(gains), seeds)
    hard = [draw.normal(0, truth.hard, count) for count in items]
    results = []
    for contender in grid.contenders:
        luck = draw.normal(0, truth.seeds, (seeds, 1))
        odds: list[Array] = [
            hardness
            + gains[contender.label]
            + luck
            + draw.normal(0, truth.own, len(hardness))
            + draw.normal(0, truth.rest, (seeds, len(hardness)))
            for hardness in hard
        ]
        scores = Scores(odds, [(task > 0).astype(float) for task in odds], tuple(map(str, range(len(items)))))
        losses = tuple((1 - luck[:, 0]).tolist())
        results.append(MethodResult(contender, TRIAL, None, 1.0, grid.final_seeds, losses, scores))
    outcome = Outcome((), dict.fromkeys(gains, (TRIAL,)), dict.fromkeys(gains, TRIAL), {})
    return StudyResult(grid, outcome, {}, tuple(results), ())


def simulated_study(
    draw: np.random.Generator, gains: Mapping[str, float], seeds: int, items: list[int], truth: Truth = TRUTH
) -> StudyResult:
    """Return the same with its comparisons."""
    result = simulated_results(draw, gains, seeds, items, truth)
    found, spreads = compared(result.grid, result.methods)
    return replace(result, methods=tuple(found), spreads=spreads)
