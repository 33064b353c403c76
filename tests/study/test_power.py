"""What a study calls better, and what its plan promised, against simulated studies whose truth is known."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from subspace.reporting.continuous import Spread, paired_difference, power_of, seeds_for, smallest_difference
from subspace.reporting.statistics import Array
from subspace.study import preview as module
from subspace.study.config import read_study
from subspace.study.grid import Grid, resolve
from subspace.study.preview import ASSUMED, pilot_spread, preview
from tests.helpers.simulated_studies import Truth, simulated_results, simulated_study
from tests.helpers.studies import STUDY, make_study

ITEMS = [150, 250]


def test_null_studies_call_nothing_better_more_often_than_they_may() -> None:
    """400 studies of three labels of one method, each with a luck of its own on every item and seed."""
    draw, better, told, grouped = np.random.default_rng(0), 0, 0, 0
    for _ in range(400):
        result = simulated_study(draw, {"one": 0.0, "two": 0.0, "three": 0.0}, 3, [40, 60])
        verdicts = [method.verdict for method in result.methods]
        better += "better" in verdicts
        told += any(verdicts)
        grouped += len({method.group for method in result.methods}) > 1
    for count in (better, told, grouped):
        assert stats.binomtest(count, 400, 0.05, alternative="greater").pvalue > 0.05


def differences(draw: np.random.Generator, gain: float, seeds: int, items: int) -> Array:
    """Return differences of answers (-1, 0, 1) as a plan assumes: 15 % differ, a third of these with every seed."""
    differ = ASSUMED.items + ASSUMED.rest
    shift = gain + draw.normal(0, math.sqrt(ASSUMED.seeds), (seeds, 1))
    place = draw.random(items)
    sign = np.where(draw.random(items) < 0.5, 1.0, -1.0)
    again = draw.random((seeds, items)) < ASSUMED.rest / (1 - ASSUMED.items)
    up = draw.random((seeds, items)) < 0.5 + shift / (2 * ASSUMED.rest)
    assert differ == pytest.approx(0.15)
    return np.where(place < ASSUMED.items, sign, again * np.where(up, 1.0, -1.0))


def found(draw: np.random.Generator, gain: float, seeds: int, items: int, studies: int = 1500) -> float:
    p_values = []
    for _ in range(studies):
        one = differences(draw, gain, seeds, items)
        p_values.append(paired_difference([np.zeros_like(one)], [one]).p)
    return float(np.mean(np.array(p_values) < 0.05))


@pytest.mark.parametrize(("seeds", "items", "studies"), [(3, 1000, 1500), (5, 400, 1500)])
def test_the_plan_before_a_pilot_keeps_its_promise(seeds: int, items: int, studies: int) -> None:
    smallest = smallest_difference(ASSUMED, [items], seeds)
    assert smallest is not None
    assert abs(found(np.random.default_rng(0), smallest, seeds, items, studies) - 0.8) < 0.03


@pytest.mark.parametrize("known", [Spread(1.0, 0.02, 1.0), Spread(0.2, 0.5, 1.0), Spread(1.0, 0.0, 0.5)])
@pytest.mark.parametrize(("seeds", "items"), [(2, 1000), (2, 100), (3, 300), (8, 50)])
def test_a_promise_is_kept_whatever_dominates_the_spread(seeds: int, items: int, known: Spread) -> None:
    """Two seeds too, of values that are normal: right and wrong answers cannot differ by as much as two seeds need."""
    smallest = smallest_difference(known, [items], seeds)
    assert smallest is not None
    draw, found = np.random.default_rng(0), []
    for _ in range(1500):
        value = smallest + math.sqrt(known.items) * draw.standard_normal((1, items))
        value = value + math.sqrt(known.seeds) * draw.standard_normal((seeds, 1))
        value = value + math.sqrt(known.rest) * draw.standard_normal((seeds, items))
        found.append(paired_difference([np.zeros((seeds, items))], [value]).p < 0.05)
    assert abs(np.mean(found) - 0.8) < 0.03


@pytest.mark.long
def test_a_difference_of_a_point_takes_the_seeds_that_were_solved_for() -> None:
    items = 8000
    needed = seeds_for(0.01, ASSUMED, [items])
    assert needed is not None
    assert needed > 2
    draw = np.random.default_rng(0)
    assert found(draw, 0.01, needed, items, 600) > 0.77
    assert found(draw, 0.01, needed - 1, items, 600) < 0.83


@pytest.mark.parametrize(
    ("pilots", "studies"), [(120, 0), pytest.param(60, 30, marks=pytest.mark.long)], ids=["by formula", "simulated"]
)
@pytest.mark.parametrize("truth", [Truth(seeds=0.1), Truth(own=0.0, rest=1.5)])
def test_the_plan_after_a_pilot_keeps_its_promise(truth: Truth, pilots: int, studies: int) -> None:
    """Pilots of six methods with four seeds; then, for each, studies of two methods with five that are so far apart.

    One pilot's promise is off by some ten points of power, as its spread is an estimate: the mean is held to three.
    """
    draw, seeds, gains = np.random.default_rng(0), 5, {f"m{number}": 0.1 * number for number in range(6)}
    powers: dict[str, list[float]] = {"log_odds": [], "correct": []} if studies else {"log_odds": []}
    for _ in range(pilots):
        observed = simulated_results(draw, gains, 4, ITEMS, truth)
        for outcome, kept in powers.items():
            known, runs = pilot_spread(observed, lambda scores, name=outcome: getattr(scores, name))  # type: ignore[misc]
            assert runs == 24
            assert known
            smallest = smallest_difference(known, ITEMS, seeds)
            assert smallest is not None
            gain = smallest if outcome == "log_odds" else gain_of(smallest, truth)
            if studies:
                kept.append(share_found(draw, gain, seeds, truth, outcome, studies))
            else:
                true = Spread(2 * truth.own**2, 2 * truth.seeds**2, 2 * truth.rest**2)
                kept.append(power_of(smallest, true, ITEMS, seeds))
    for outcome, kept in powers.items():
        assert abs(np.mean(kept) - 0.8) < 0.03, outcome


def share_found(draw: np.random.Generator, gain: float, seeds: int, truth: Truth, outcome: str, studies: int) -> float:
    p_values = []
    for _ in range(studies):
        result = simulated_results(draw, {"one": 0.0, "two": gain}, seeds, ITEMS, truth)
        one, two = (getattr(method.scores, outcome) for method in result.methods)
        p_values.append(paired_difference(one, two).p)
    return float(np.mean(np.array(p_values) < 0.05))


def gain_of(points: float, truth: Truth) -> float:
    """Return the gain in log-odds that raises accuracy from a half by so much."""
    low, high = 0.0, 10.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if truth.accuracy(middle) < 0.5 + points else (low, middle)
    return high


def test_a_pilot_s_spread_stands_where_one_was_assumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = scored_grid(tmp_path)
    before = preview(grid, difference=10)
    assert before.known == ASSUMED
    assert any("as is assumed before there are finals: 15.0 % of the answers differ" in line for line in before.lines())
    observed = simulated_study(np.random.default_rng(1), {"lora": 0.0, "ssb": 0.2}, 4, ITEMS)
    monkeypatch.setattr(module, "read_results", lambda grid: observed)
    after = preview(grid, difference=10)
    assert after.pilot == 8
    assert after.known == pilot_spread(observed, lambda scores: scores.correct)[0]
    assert after.smallest == smallest_difference(after.known, after.items, 2)
    assert after.wanted == (0.1, seeds_for(0.1, after.known, after.items))
    said = "\n".join(after.lines())
    assert "as the 8 finals so far show" in said
    assert "assumed" not in said
    assert f"by the finals so far: {after.primary:.3f} log-odds" in said
    one_seed = simulated_study(np.random.default_rng(0), {"lora": 0.0, "ssb": 0.0}, 1, ITEMS)
    assert pilot_spread(one_seed, lambda scores: scores.correct) == (None, 0)


def scored_grid(root: Path) -> Grid:
    """Return the grid of a study with 400 items of its own."""
    items = [f'{{"question": "q{number}", "choices": ["a", "b"], "label": {number % 2}}}' for number in range(400)]
    (root / "items.jsonl").write_text("\n".join(items))
    (root / "quiz.yaml").write_text("file: items.jsonl\n")
    text = STUDY.replace("outcome: {{primary: validation_loss}}\n", "").replace(
        "train.steps: 5,", f"train.steps: 5, evaluate.protocol: likelihood, evaluate.tasks: {root / 'quiz.yaml'},"
    )
    return resolve(read_study(make_study(root, text=text)), centred=False)
