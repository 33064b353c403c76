"""Paired differences over seeds and items: they cover the truth, and promise what they keep."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from subspace.reporting.continuous import (
    Spread,
    paired_difference,
    paired_over_seeds,
    power_of,
    seeds_for,
    smallest_difference,
    spread,
)
from subspace.reporting.statistics import Array, holm


def drawn(
    draw: np.random.Generator, known: Spread, seeds: int, items: list[int], difference: float = 0.0
) -> list[Array]:
    """Return a method's values less another's: a normal effect of each item, each seed, and the rest."""
    of_seeds = draw.normal(0, math.sqrt(known.seeds), (seeds, 1))
    return [
        difference
        + of_seeds
        + draw.normal(0, math.sqrt(known.items), (1, count))
        + draw.normal(0, math.sqrt(known.rest), (seeds, count))
        for count in items
    ]


def zeros(like: list[Array]) -> list[Array]:
    return [np.zeros_like(task) for task in like]


@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
@pytest.mark.parametrize("known", [Spread(1.0, 0.0, 1.0), Spread(0.3, 0.01, 1.0), Spread(0.1, 0.1, 0.1)])
def test_intervals_cover_the_truth_whatever_varies_most(seeds: int, known: Spread) -> None:
    draw = np.random.default_rng(0)
    if seeds == 1:
        known = known._replace(seeds=0.0)  # with one seed the interval holds for the runs only
    covered = 0
    for _ in range(400):
        found = paired_difference(zeros(one := drawn(draw, known, seeds, [30, 60], 0.2)), one)
        covered += found.low <= 0.2 <= found.high
        assert (found.p < 0.05) == (found.low > 0 or found.high < 0)
    assert stats.binomtest(covered, 400, 0.95, alternative="less").pvalue > 0.01


def test_null_studies_seldom_call_a_method_better() -> None:
    """400 studies of five equal methods against one, whose seeds and items vary: Holm's error over all of them."""
    draw, known, wrong = np.random.default_rng(0), Spread(0.2, 0.01, 0.5), 0
    for _ in range(400):
        reference = drawn(draw, known, 3, [50, 50])
        others = [drawn(draw, known, 3, [50, 50]) for _ in range(5)]
        p_values = holm([paired_difference(reference, other).p for other in others])
        wrong += min(p_values) < 0.05
    assert stats.binomtest(wrong, 400, 0.05, alternative="greater").pvalue > 0.05


@pytest.mark.parametrize(
    ("known", "seeds", "items"),
    [(Spread(0.3, 0.003, 0.5), 3, [400]), (Spread(0.1, 0.01, 0.5), 2, [100, 100]), (Spread(1.0, 0.0, 1.0), 5, [60])],
)
def test_power_is_what_was_promised(known: Spread, seeds: int, items: list[int]) -> None:
    difference = smallest_difference(known, items, seeds)
    assert difference is not None
    draw = np.random.default_rng(0)
    runs = [drawn(draw, known, seeds, items, difference) for _ in range(1500)]
    found = np.mean([paired_difference(zeros(run), run).p < 0.05 for run in runs])
    assert abs(found - 0.8) < 0.03
    assert power_of(difference, known, items, seeds) == pytest.approx(0.8, abs=1e-6)


def test_seeds_are_solved_for() -> None:
    known, items = Spread(0.05, 0.005**2, 0.1), [2000]
    needed = seeds_for(0.03, known, items)
    assert needed is not None
    assert power_of(0.03, known, items, needed) >= 0.8 > power_of(0.03, known, items, needed - 1)
    assert seeds_for(0.005, known, items) is None  # the items alone vary by more


def test_the_spread_is_recovered() -> None:
    draw, known = np.random.default_rng(0), Spread(0.5, 0.2, 0.3)
    found = [spread(zeros(run), run) for run in (drawn(draw, known, 4, [40, 40]) for _ in range(300))]
    assert np.mean(found, axis=0) == pytest.approx(known, rel=0.15)


def test_paired_seeds_remove_what_both_share() -> None:
    draw = np.random.default_rng(0)
    luck = draw.normal(0, 1, 5)
    found = paired_over_seeds(luck.tolist(), (luck + 0.1 + draw.normal(0, 0.01, 5)).tolist())
    assert found.value == pytest.approx(0.1, abs=0.02)
    assert found.p < 1e-3


def test_a_t_test_over_seeds_is_scipy_s() -> None:
    draw = np.random.default_rng(0)
    one, two = draw.normal(0, 1, 6), draw.normal(0.5, 1, 6)
    found, theirs = paired_over_seeds(one.tolist(), two.tolist()), stats.ttest_rel(two, one)
    interval = theirs.confidence_interval()
    assert (found.p, found.low, found.high) == pytest.approx((theirs.pvalue, interval.low, interval.high))


def test_seeds_that_agree_exactly_do_not_make_p_small() -> None:
    """Two seeds whose means are equal to the last bit: the items alone decide, and p says what the interval says."""
    one = [np.array([[0.5, -0.5, 0.25, -0.25], [-0.5, 0.5, -0.25, 0.25]]) + np.array([1.0, -1.0, 0.5, -0.25])]
    found = paired_difference(zeros(one), one)
    assert found.low < 0 < found.high
    assert 0.5 < found.p < 1
    assert paired_over_seeds([0.0, 0.0], [0.0, 0.0], rounding=1.0).p == pytest.approx(1.0)


def test_what_nothing_is_known_of_has_no_bounds() -> None:
    one = [np.array([[0.3]])]
    found = paired_difference(zeros(one), one)  # one item, one seed
    assert (found.low, found.high, found.p) == (-math.inf, math.inf, 1.0)
    constant = [np.full((2, 3), 0.3)]
    assert paired_difference(zeros(constant), constant).p == 1.0
    equal = paired_difference(constant, constant)
    assert (equal.low, equal.value, equal.high, equal.p) == (0.0, 0.0, 0.0, 1.0)
    assert paired_over_seeds([1.0], [2.0]).high == math.inf
