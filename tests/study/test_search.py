"""The search as a function of losses: what is due, who wins, when ladders grow, and what groups there are."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from subspace.study.search import (
    EXTENSIONS,
    HIGHEST_RATE,
    Outcome,
    Rules,
    Trial,
    common_rates,
    kendall_tau,
    letters,
    round_rate,
    rungs_of,
    search,
)

RULES = Rules((2, 4, 10), keep=0.5, step=10**0.5)
LossOf = Callable[[str, Trial, int], float]


def ladder(centre: float, count: int = 5) -> list[Trial]:
    return [Trial(round_rate(centre * RULES.step ** (k - count // 2))) for k in range(count)]  # type: ignore[operator]


def played(planned: dict[str, list[Trial]], loss: LossOf, rules: Rules = RULES) -> tuple[Outcome, dict[str, int]]:
    """Return the end of a search whose trainings have these losses, and the steps that each method took."""
    losses: dict[tuple[str, Trial, int], float] = {}
    for _ in range(1000):
        outcome = search(planned, losses, rules)
        if outcome.ended:
            steps = dict.fromkeys(planned, 0)
            for method, trial, step in losses:
                before = max((s for m, t, s in losses if (m, t) == (method, trial) and s < step), default=0)
                steps[method] += step - before
            return outcome, steps
        for job in outcome.due:
            assert job not in losses
            losses[job] = loss(*job)
    raise AssertionError("the search does not end")


def quadratic(optimum: dict[str, float]) -> LossOf:
    """Return the loss of methods that are best at a rate, and get better with steps."""
    return lambda method, trial, step: (math.log10(trial.rate) - math.log10(optimum[method])) ** 2 + 1 / step


def test_a_planted_rate_is_found_by_growing_every_ladder_alike() -> None:
    optimum = {"inside": 1e-3, "above": 1e-1, "below": 8e-5}
    planned = {name: ladder(1e-3, 3) for name in optimum}
    outcome, _ = played(planned, quadratic(optimum))
    assert {name: len(tried) for name, tried in outcome.trials.items()} == dict.fromkeys(optimum, 3 + 2 * EXTENSIONS)
    assert outcome.best["inside"].rate == 1e-3
    assert outcome.best["below"].rate == 1e-4  # the end was 3.2e-4
    # Two steps of half a decade above 3.2e-3 are 3.2e-2: still an end, and marked.
    assert outcome.best["above"].rate == 3.2e-2
    assert outcome.edges == {"above": "high"}


def test_a_rate_just_beyond_the_ladder_is_found_and_not_marked() -> None:
    optimum = {"a": 1e-3, "b": 1e-2}
    outcome, _ = played({name: ladder(1e-3, 3) for name in optimum}, quadratic(optimum))
    assert {name: trial.rate for name, trial in outcome.best.items()} == optimum
    assert outcome.edges == {}
    assert {len(tried) for tried in outcome.trials.values()} == {5}


def test_no_ladder_grows_beyond_the_highest_rate_that_a_run_takes() -> None:
    optimum = {"a": 1e9, "b": 1e4}
    outcome, _ = played({name: ladder(1e5, 3) for name in optimum}, quadratic(optimum))
    assert max(trial.rate for tried in outcome.trials.values() for trial in tried) == HIGHEST_RATE == 1e6
    assert outcome.edges["a"] == "high"
    assert {len(tried) for tried in outcome.trials.values()} == {3 + 1 + EXTENSIONS}  # once above, twice below


def test_halving_keeps_the_better_half_and_finds_the_best() -> None:
    planned = {"a": ladder(1e-3)}
    outcome, steps = played(planned, quadratic({"a": 1e-3}))
    # Five to step 2, three to step 4, two to the end.
    assert steps == {"a": 5 * 2 + 3 * 2 + 2 * 6}
    assert outcome.best["a"].rate == 1e-3
    whole, all_steps = played(planned, quadratic({"a": 1e-3}), Rules((10,), 0.5, RULES.step))
    assert (whole.best, all_steps) == (outcome.best, {"a": 50})


def test_a_trial_of_a_grown_ladder_is_dropped_where_the_first_ones_were() -> None:
    def loss(method: str, trial: Trial, step: int) -> float:
        if trial.rate > 3.3e-3:
            return 100.0 + step  # beyond the ladder, worse than all
        return -trial.rate

    outcome, steps = played({"a": ladder(1e-3, 3)}, loss)
    assert outcome.best["a"].rate == 3.2e-3
    assert steps["a"] == 3 * 2 + 2 * 2 + 1 * 6 + 2  # two of three go on, one of these; the new one stops at step 2


def test_a_training_that_failed_is_the_worst_and_does_not_stop_the_search() -> None:
    def loss(method: str, trial: Trial, step: int) -> float:
        return math.inf if trial.rate >= 1e-3 else quadratic({"a": 1e-3})(method, trial, step)

    outcome, _ = played({"a": ladder(1e-3)}, loss)
    assert outcome.best["a"].rate == 3.2e-4


def test_nothing_is_asked_twice_and_the_order_of_answers_does_not_matter() -> None:
    optimum = {"a": 1e-3, "b": 1e-1}
    planned = {name: ladder(1e-3, 3) for name in optimum}
    straight, _ = played(planned, quadratic(optimum))
    draw = np.random.default_rng(0)
    losses: dict[tuple[str, Trial, int], float] = {}
    while (outcome := search(planned, losses, RULES)).due:
        job = outcome.due[int(draw.integers(len(outcome.due)))]
        losses[job] = quadratic(optimum)(*job)
    assert outcome == straight


def test_the_winner_s_curse_is_in_the_search_and_not_in_the_finals() -> None:
    """Twenty equal methods, judged with noise: the finals' mean is unbiased, the search's best is not."""
    draw = np.random.default_rng(0)
    gaps, searched = [], []
    for _ in range(200):
        planned = {f"m{number}": ladder(1e-3, 5) for number in range(20)}
        noisy = {(m, t): draw.normal(1.0, 0.1) for m, tried in planned.items() for t in tried}
        outcome, _ = played(planned, lambda m, t, step, noisy=noisy: noisy.get((m, t), 2.0), Rules((10,), 0.5, None))  # type: ignore[misc]
        searched.append(np.mean([noisy[m, trial] for m, trial in outcome.best.items()]) - 1.0)
        gaps.append(np.mean(draw.normal(1.0, 0.1, size=(20, 3))) - 1.0)  # fresh seeds
    assert stats.ttest_1samp(gaps, 0).pvalue > 0.01
    assert stats.ttest_1samp(searched, 0).pvalue < 1e-20
    assert np.mean(searched) < -0.1


@pytest.mark.parametrize(
    ("steps", "first", "keep", "shares", "expected"),
    [
        (60, 0.2, 0.5, (), (12, 24, 60)),
        (60, 0.2, 0.5, (0.5,), (12, 24, 60)),  # a multiple of the first, where it is validated
        (10, 0.1, 1 / 3, (), (1, 3, 10)),
        (10, 1.0, 0.5, (), (10,)),
        (3, 0.01, 0.5, (), (1, 2, 3)),
    ],
)
def test_rungs_are_multiples_of_the_first(
    steps: int, first: float, keep: float, shares: tuple[float, ...], expected: tuple[int, ...]
) -> None:
    rungs = rungs_of(steps, first, keep, shares)
    assert all(rung % rungs[0] == 0 for rung in rungs[:-1])
    assert rungs == expected


def test_tau_is_scipy_s() -> None:
    draw = np.random.default_rng(1)
    for _ in range(50):
        one, two = (draw.integers(0, 6, 8).tolist() for _ in range(2))
        names = [str(number) for number in range(8)]
        tau = kendall_tau(dict(zip(names, one, strict=True)), dict(zip(names, two, strict=True)))
        assert tau == pytest.approx(stats.kendalltau(one, two).statistic)
    assert kendall_tau({"a": 1, "b": 2}, {"a": 1, "b": 2}) is None


def test_common_rates_are_those_that_half_of_the_methods_tried() -> None:
    trials = {"a": ladder(1e-3, 3), "b": ladder(1e-3, 3), "c": ladder(3.2e-3, 3), "d": ladder(1e-1, 3)}
    losses = {(m, t, 2): t.rate for m, tried in trials.items() for t in tried}
    assert [rate for rate, _ in common_rates(losses, trials, 2)] == [1e-3, 3.2e-3]


def test_letters_are_shared_by_what_is_not_told_apart() -> None:
    names = ["a", "b", "c", "d"]
    assert letters(names, set()) == dict.fromkeys(names, "a")
    apart = {frozenset(pair) for pair in (("a", "c"), ("a", "d"), ("b", "d"))}
    assert letters(names, apart) == {"a": "a", "b": "ab", "c": "bc", "d": "c"}
    draw = np.random.default_rng(0)
    for _ in range(50):
        pairs = [frozenset((x, y)) for i, x in enumerate(names) for y in names[:i]]
        told = {pair for pair in pairs if draw.random() < 0.5}
        marks = letters(names, told)
        assert {pair for pair in pairs if not set.intersection(*(set(marks[name]) for name in pair))} == told
