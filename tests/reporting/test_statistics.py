"""The statistics agree with independent implementations, and are right as often as they say, truth being known."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from subspace.reporting import statistics
from subspace.reporting.statistics import Array, Run

Generator = np.random.Generator


def marks(right: int, items: int) -> Array:
    """One seed that has the first ``right`` of ``items`` right."""
    return (np.arange(items) < right).astype(float)[None]


def pair(lost: int, gained: int, both: int, neither: int) -> tuple[Array, Array]:
    """Two runs on one task, by how many items each of them has right."""
    before = np.repeat([1.0, 0.0, 1.0, 0.0], [lost, gained, both, neither])
    after = np.repeat([0.0, 1.0, 1.0, 0.0], [lost, gained, both, neither])
    return before[None], after[None]


# Against independent implementations.


@pytest.mark.parametrize(("right", "items"), [(0, 30), (1, 30), (17, 30), (30, 30), (2033, 3270), (9999, 10042)])
def test_a_tasks_interval_is_scipys(right: int, items: int) -> None:
    found = statistics.estimate([marks(right, items)])
    expected = stats.binomtest(right, items).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert found.value == right / items
    assert found.error == pytest.approx(stats.binom(items, right / items).std() / items)


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (0, 5), (0, 6), (3, 14), (40, 40), (120, 180)])
def test_mcnemar_is_statsmodels_and_scipys(lost: int, gained: int) -> None:
    found = statistics.mcnemar(lost, gained)
    assert found == pytest.approx(mcnemar([[50, lost], [gained, 20]], exact=True).pvalue, abs=1e-12)
    assert found == pytest.approx(stats.binomtest(lost, max(lost + gained, 1)).pvalue if lost + gained else 1.0)
    before, after = pair(lost, gained, both=50, neither=20)
    assert statistics.difference([before], [after], draws=10).p == found


@pytest.mark.parametrize("p_values", [[0.01], [0.04, 0.001, 0.03, 0.5], [0.02, 0.02, 0.9, 1.0, 0.0], []])
def test_holm_is_statsmodels(p_values: list[float]) -> None:
    expected = multipletests(p_values, method="holm")[1] if p_values else []
    assert statistics.holm(p_values) == pytest.approx(list(expected))


def test_the_paired_bootstrap_is_scipys() -> None:
    before, after = pair(lost=30, gained=55, both=300, neither=115)
    found = statistics.difference([before], [after])
    expected = stats.bootstrap(
        (before[0], after[0]),
        lambda one, other, axis: other.mean(axis) - one.mean(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(1),
    )
    interval = expected.confidence_interval
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=0.0021)  # steps of 1 in 500
    assert found.error == pytest.approx(expected.standard_error, rel=0.03)
    assert (found.value, found.lost, found.gained) == pytest.approx((0.05, 30, 55))


def test_the_mean_weighs_tasks_alike_and_keeps_them_apart() -> None:
    one, other = marks(30, 100), marks(900, 1000)
    found = statistics.estimate([one, other])
    assert found.value == pytest.approx(0.6)
    assert found.error == pytest.approx((0.3 * 0.7 / 100 + 0.9 * 0.1 / 1000) ** 0.5 / 2)
    assert (found.low, found.high) == pytest.approx((0.6 - 1.96 * found.error, 0.6 + 1.96 * found.error), abs=2e-3)

    # A gain in the one and as large a loss in the other are no difference of the mean.
    gain, loss = pair(0, 50, 25, 25), pair(500, 0, 250, 250)
    balanced = statistics.difference([gain[0], loss[0]], [gain[1], loss[1]])
    assert balanced.value == pytest.approx(0)
    assert balanced.p == pytest.approx(1, abs=0.02)


def test_the_test_of_a_mean_is_mcnemars_in_strata() -> None:
    """Over two tasks of one size it is McNemar's of both together; a few items that all flipped one way say little."""
    one, other = pair(12, 25, 50, 13), pair(8, 14, 60, 18)
    found = statistics.difference([one[0], other[0]], [one[1], other[1]])
    assert found.p == pytest.approx(statistics.mcnemar(20, 39), abs=0.004)
    changes = [np.repeat([-1, 1, 0], counts) for counts in ((12, 25, 63), (8, 14, 78))]
    assert found.value == pytest.approx(np.mean(changes))
    assert found.error == pytest.approx(sum(several.var() / 100 for several in changes) ** 0.5 / 2, rel=0.02)
    one, other = pair(0, 2, 1, 1), pair(0, 1, 2, 1)
    assert statistics.difference([one[0], other[0]], [one[1], other[1]]).p == pytest.approx(0.25, abs=0.01)


def test_seeds_share_their_items() -> None:
    """Three seeds with the same answers are no more than one; that the answers are three times there says nothing."""
    one = marks(70, 100)
    thrice = statistics.estimate([np.repeat(one, 3, axis=0)])
    assert thrice.error == pytest.approx(statistics.estimate([one]).error, rel=0.03)
    assert statistics.seed_spread([np.repeat(one, 3, axis=0)]) == pytest.approx(0)


def test_the_error_over_seeds_is_that_of_the_analysis_of_variance() -> None:
    """Two-way random effects: Var(mean) = (MS_seeds + MS_items - MS_rest) / (S n)."""
    random = np.random.default_rng(3)
    hard, luck = random.normal(size=90), np.array([-0.3, 0.4, 0.0, 0.1])
    task = (random.normal(size=(4, 90)) + hard + luck[:, None] > 0).astype(float)
    seeds, items = task.shape
    of_seeds = items * task.mean(1).var(ddof=1)
    of_items = seeds * task.mean(0).var(ddof=1)
    total = ((task - task.mean()) ** 2).sum()
    rest = (total - (seeds - 1) * of_seeds - (items - 1) * of_items) / ((seeds - 1) * (items - 1))
    expected = ((of_seeds + of_items - rest) / task.size) ** 0.5
    assert of_seeds > 1.5 * rest  # else there would be no variance of the seeds alone
    assert statistics.estimate([task]).error == pytest.approx(expected, rel=0.02)
    assert statistics.seed_spread([task]) == pytest.approx(task.mean(1).std(ddof=1))


def test_what_does_not_differ_has_no_difference() -> None:
    one = marks(7, 10)
    assert statistics.difference([one, one], [one, one])[:5] == (0, 0, 0, 0, 1)
    both = np.repeat(one, 2, axis=0)
    assert statistics.difference([both], [both])[:5] == (0, 0, 0, 0, 1)


def test_one_item_is_few_but_no_error() -> None:
    right, wrong = np.ones((2, 1)), np.zeros((2, 1))
    assert statistics.estimate([right])[:2] == (1, 0)
    assert statistics.difference([right[:1]], [wrong[:1]]).p == 1
    assert statistics.difference([right, wrong], [wrong, wrong]).value == -0.5
    assert statistics.detectable_between([right[:1]], [wrong[:1]]) is None


# On simulated data of known truth. 1,000 repetitions put 95 % coverage between 93.6 and 96.4 % (two standard errors).

REPETITIONS = 1000


def coverage(simulate: Callable[[Generator], tuple[float, float, float]]) -> float:
    """Return how often the truth lies in the interval; ``simulate`` returns it and the interval's ends."""
    random = np.random.default_rng(20261123)
    drawn = [simulate(random) for _ in range(REPETITIONS)]
    return sum(low <= truth <= high for truth, low, high in drawn) / len(drawn)


def one_run(random: Generator, sizes: Sequence[int], shares: Sequence[float]) -> Run:
    return [(random.random((1, n)) < p).astype(float) for n, p in zip(sizes, shares, strict=True)]


@pytest.mark.parametrize(
    ("sizes", "shares"),
    [
        ([200], [0.3]),
        ([1172], [0.61]),
        ([1838], [0.97]),
        ([100] * 8, [0.6, 0.7, 0.8, 0.9, 0.75, 0.8, 0.5, 0.7]),
        ([32] * 8, [0.95] * 8),
        ([3270, 1838, 500], [0.65, 0.8, 0.99]),
    ],
)
def test_the_interval_of_a_run_covers_the_truth(sizes: list[int], shares: list[float]) -> None:
    def simulate(random: Generator) -> tuple[float, float, float]:
        found = statistics.estimate(one_run(random, sizes, shares))
        return float(np.mean(shares)), found.low, found.high

    assert 0.93 <= coverage(simulate) <= 0.97


@pytest.mark.parametrize(
    ("sizes", "lost", "gained"),
    [
        ([500], 0.04, 0.08),
        pytest.param([1838], 0.02, 0.02, marks=pytest.mark.long),
        pytest.param([100] * 4, 0.05, 0.1, marks=pytest.mark.long),
        ([300] * 2, 0.1, 0.02),
    ],
)
def test_the_interval_of_a_paired_difference_covers_the_truth(sizes: list[int], lost: float, gained: float) -> None:
    def simulate(random: Generator) -> tuple[float, float, float]:
        befores, afters = [], []
        for n in sizes:
            a, b, both, neither = random.multinomial(n, [lost, gained, 0.6, 0.4 - lost - gained])
            before, after = pair(a, b, both, neither)
            befores.append(before)
            afters.append(after)
        found = statistics.difference(befores, afters, draws=500)
        return gained - lost, found.low, found.high

    assert 0.93 <= coverage(simulate) <= 0.97


def seeds_of(random: Generator, seeds: int, easy: Array, effect: float, shift: float = 0.0) -> Array:
    """Answers of some seeds on items that are ``easy``: the items' probabilities, moved by the seed's own luck."""
    luck = random.normal(0, effect, size=(seeds, 1)) + shift
    return (random.random((seeds, len(easy))) < easy + luck * 4 * easy * (1 - easy)).astype(float)


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("effect", [0.0, 0.01, 0.05])
def test_the_interval_over_seeds_covers_the_truth(seeds: int, effect: float) -> None:
    """The truth is the method's, over all seeds and all items: most items are always right or always wrong."""

    def simulate(random: Generator) -> tuple[float, float, float]:
        task = seeds_of(random, seeds, random.beta(0.7, 0.3, size=600), effect)
        found = statistics._hierarchical([([task], 1)], draws=400)
        return 0.7, found.low, found.high

    assert 0.93 <= coverage(simulate) <= 0.975


@pytest.mark.parametrize(("seeds", "effect"), [(5, 0.0), (5, 0.01), (5, 0.05), (3, 0.02)])
def test_the_interval_of_a_difference_over_seeds_covers_the_truth(seeds: int, effect: float) -> None:
    def simulate(random: Generator) -> tuple[float, float, float]:
        easy = random.beta(0.7, 0.3, size=600)
        before, after = seeds_of(random, seeds, easy, effect), seeds_of(random, seeds, easy, effect, shift=0.02)
        found = statistics.difference([before], [after], draws=400)
        return 0.02 * 4 * 0.7 * 0.3 / 2, found.low, found.high  # E[easy (1 - easy)] of beta(0.7, 0.3) is 0.21 / 2

    assert 0.93 <= coverage(simulate) <= 0.975


# What can be detected.


@pytest.mark.parametrize(("items", "discordance"), [([500], 0.15), ([1838], 0.05), ([3270, 1838, 500], 0.1)])
def test_what_is_detectable_is_detected_with_the_stated_power(items: list[int], discordance: float) -> None:
    d = statistics.detectable_difference(items, discordance)
    assert d is not None
    random = np.random.default_rng(5)
    gained, lost = (discordance + d) / 2, (discordance - d) / 2
    seen = 0
    for _ in range(1000):
        # The test that Connor's formula is about: the difference over its standard error under no difference.
        counts = [random.multinomial(n, [lost, gained, 1 - discordance]) for n in items]
        value = sum((b - a) / n for n, (a, b, _) in zip(items, counts, strict=True))
        error = sum((a + b) / n**2 for n, (a, b, _) in zip(items, counts, strict=True)) ** 0.5
        seen += abs(value) > 1.96 * error
    assert seen / 1000 == pytest.approx(0.8, abs=0.04)


def test_a_difference_needs_as_much_discordance() -> None:
    d = statistics.detectable_difference([40], 0.05)
    assert d is not None
    assert d > 0.05
    assert statistics.detectable_difference([40], d) == pytest.approx(d, rel=1e-3)
    assert statistics.detectable_difference([3]) is None


def test_more_items_detect_less_and_more_discordance_hides_more() -> None:
    found = [statistics.detectable_difference([n], psi) or 1 for n, psi in [(1000, 0.1), (2000, 0.1), (2000, 0.2)]]
    assert found[1] < found[0]
    assert found[1] < found[2]


def test_between_two_runs_the_discordance_is_theirs() -> None:
    before, after = pair(40, 50, 300, 110)
    assert statistics.detectable_between([before], [after]) == statistics.detectable_difference([500], 90 / 500)
    several = [np.repeat(before, 3, axis=0)]
    assert statistics.detectable_between(several, [after]) == pytest.approx(
        statistics.detectable_difference([500], 90 / 500), rel=0.05
    )


def test_what_can_be_detected_is_said_in_one_line() -> None:
    line = statistics.power_statement({"BoolQ": 3270, "OBQA": 500, "tiny": 3})
    assert "\n" not in line
    assert f"BoolQ {100 * (statistics.detectable_difference([3270]) or 0):.1f}, OBQA 4.8, tiny none, their mean" in line
    assert "power 80 %, alpha 5 %, if 15 % of the answers differ" in line
