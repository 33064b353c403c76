"""The statistics agree with independent implementations, and are right as often as they say, truth being known."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

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
def test_a_tasks_interval_is_that_of_mid_p(right: int, items: int) -> None:
    """At its ends half of what was observed, and all that is further off, has a probability of 2.5 %."""
    found = statistics.estimate([marks(right, items)])
    if right:
        below = stats.binom(items, found.low)
        assert below.sf(right) + below.pmf(right) / 2 == pytest.approx(0.025)
    else:
        assert found.low == 0
    if right < items:
        above = stats.binom(items, found.high)
        assert above.cdf(right - 1) + above.pmf(right) / 2 == pytest.approx(0.025)
    else:
        assert found.high == 1
    exact = stats.binomtest(right, items).proportion_ci(method="exact")
    assert exact.low <= found.low <= right / items <= found.high <= exact.high
    assert found.value == right / items
    assert found.error == pytest.approx(stats.binom(items, right / items).std() / items)


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (0, 5), (0, 6), (3, 14), (40, 40), (120, 180)])
def test_mcnemar_is_statsmodels_and_scipys(lost: int, gained: int) -> None:
    found = statistics.mcnemar(lost, gained)
    assert found == pytest.approx(mcnemar([[50, lost], [gained, 20]], exact=True).pvalue, abs=1e-12)
    assert found == pytest.approx(stats.binomtest(lost, max(lost + gained, 1)).pvalue if lost + gained else 1.0)
    before, after = pair(lost, gained, both=50, neither=20)
    assert statistics.difference([before], [after]).p == found


@pytest.mark.parametrize("p_values", [[0.01], [0.04, 0.001, 0.03, 0.5], [0.02, 0.02, 0.9, 1.0, 0.0], []])
def test_holm_is_statsmodels(p_values: list[float]) -> None:
    expected = multipletests(p_values, method="holm")[1] if p_values else []
    assert statistics.holm(p_values) == pytest.approx(list(expected))


def test_the_interval_of_a_run_is_agresti_and_coulls() -> None:
    """Of several tasks alike it is theirs over all items; of others it is narrower, about the same centre."""
    right = [0, 3, 9]
    expected = proportion_confint(sum(right), 30, method="agresti_coull")
    center, half = (expected[0] + expected[1]) / 2, (expected[1] - expected[0]) / 2
    found = statistics.estimate([marks(count, 10) for count in right])
    assert (found.low + found.high) / 2 == pytest.approx(center)
    assert (found.high - found.low) / 2 < half  # for what lies between the strata is no chance
    alike = statistics.estimate([marks(4, 10)] * 3)
    low, high = proportion_confint(12, 30, method="agresti_coull")
    student = stats.t(27).ppf(0.975) / stats.norm.ppf(0.975)
    assert (alike.low + alike.high, alike.high - alike.low) == pytest.approx((low + high, (high - low) * student))


def test_the_interval_of_a_paired_difference_is_bonett_and_prices() -> None:
    before, after = pair(lost=30, gained=55, both=300, neither=115)
    found = statistics.difference([before], [after])
    one, other = 31 / 502, 56 / 502
    half = stats.norm.ppf(0.975) * ((one + other - (other - one) ** 2) / 502) ** 0.5
    assert (found.low, found.high) == pytest.approx((other - one - half, other - one + half), abs=1e-12)
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
    assert (found.low, found.high) == pytest.approx((0.6 - 1.96 * found.error, 0.6 + 1.96 * found.error), abs=4e-3)

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


@pytest.mark.parametrize("seeds", [1, 2, 5])
@pytest.mark.parametrize("sizes", [[1], [2], [30], [1, 1, 4], [1000]])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_where_all_agree_something_is_unknown(share: float, sizes: list[int], seeds: int) -> None:
    """No width of zero, nothing beyond the scale, no p of a handful, and no more certain for more seeds."""
    run = [np.full((seeds, n), share) for n in sizes]
    alone = statistics.estimate([task[:1] for task in run])
    found = statistics.estimate(run)
    assert (found.value, found.error) == (share, 0)
    assert found.high - found.low >= alone.high - alone.low - 1e-12 > 0
    assert 0 <= found.low <= share <= found.high <= 1
    same = statistics.difference(run, run)
    assert (same.value, same.error, same.p) == (0, 0, 1)
    assert -1 <= same.low == pytest.approx(-same.high)
    assert same.low < 0
    assert same.high - same.low > 1 / sum(sizes)


def test_one_item_is_few_but_no_error() -> None:
    right, wrong = np.ones((2, 1)), np.zeros((2, 1))
    assert statistics.difference([right[:1]], [wrong[:1]]).p == 1
    found = statistics.difference([right, wrong], [wrong, wrong])
    assert (found.value, found.low) == (-0.5, -1)
    assert found.high > 0
    assert found.p > 0.3
    assert statistics.difference([right], [wrong]).p > 0.3
    assert statistics.detectable_between([right], [wrong]) is None
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
        ([1838], 0.02, 0.02),
        ([100] * 4, 0.05, 0.1),
        ([300] * 2, 0.1, 0.02),
    ],
)
def test_the_interval_of_a_paired_difference_covers_the_truth(
    sizes: list[int], lost: float, gained: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "DRAWS", 10)  # the p-value's, which is not looked at

    def simulate(random: Generator) -> tuple[float, float, float]:
        befores, afters = [], []
        for n in sizes:
            a, b, both, neither = random.multinomial(n, [lost, gained, 0.6, 0.4 - lost - gained])
            before, after = pair(a, b, both, neither)
            befores.append(before)
            afters.append(after)
        found = statistics.difference(befores, afters)
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
        found = statistics.estimate([task])
        return 0.7, found.low, found.high

    assert 0.93 <= coverage(simulate) <= 0.975


@pytest.mark.parametrize(("seeds", "effect"), [(5, 0.0), (5, 0.01), (5, 0.05), (3, 0.02)])
def test_the_interval_of_a_difference_over_seeds_covers_the_truth(seeds: int, effect: float) -> None:
    def simulate(random: Generator) -> tuple[float, float, float]:
        easy = random.beta(0.7, 0.3, size=600)
        before, after = seeds_of(random, seeds, easy, effect), seeds_of(random, seeds, easy, effect, shift=0.02)
        found = statistics.difference([before], [after])
        return 0.02 * 4 * 0.7 * 0.3 / 2, found.low, found.high  # E[easy (1 - easy)] of beta(0.7, 0.3) is 0.21 / 2

    assert 0.93 <= coverage(simulate) <= 0.975


@pytest.mark.parametrize("items", [1, 2, 3, 5, 8, 16, 32, 60])
def test_the_interval_of_a_difference_on_few_items_covers_the_truth(items: int) -> None:
    """Exactly, over all that can come out, for runs that are right on half of the items or more."""
    outcomes = [(lost, gained) for lost in range(items + 1) for gained in range(items + 1 - lost)]
    ends = [
        statistics.difference(*([run] for run in pair(lost, gained, items - lost - gained, 0)))[2:4]
        for lost, gained in outcomes
    ]
    low, high = np.asarray(ends).T
    rates = []
    for lost, gained in itertools.product((0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5), repeat=2):
        chances = stats.multinomial(items, [lost, gained, 1 - lost - gained]).pmf(
            [[a, b, items - a - b] for a, b in outcomes]
        )
        covered = (low <= gained - lost + 1e-12) & (high >= gained - lost - 1e-12)
        rates.append(float(chances[covered].sum()))
    assert min(rates) >= 0.9
    assert np.mean(rates) >= 0.94


RATES = np.linspace(0.5, 1, 126)


def covered_exactly(items: int, ends: Array) -> Array:
    """Return for each rate how often the truth lies in the interval ``ends[right]`` of a binomial number of items."""
    chances = stats.binom.pmf(np.arange(items + 1), items, np.minimum(RATES, 1)[:, None])
    inside = (ends[:, 0] <= RATES[:, None] + 1e-12) & (ends[:, 1] >= RATES[:, None] - 1e-12)
    return np.asarray((chances * inside).sum(1))


@pytest.mark.parametrize("items", [*range(1, 13), 17, 18, 25, 40, 64, 100, 175])
def test_the_interval_of_a_rate_covers_it_from_one_item_on(items: int) -> None:
    """Exactly, over all that can come out, for rates from a half to one: 94 % on the mean, nowhere below 90."""
    ends = np.array([statistics.mid_p(right, items) for right in range(items + 1)])
    rates = covered_exactly(items, ends)
    assert rates.mean() >= 0.94
    assert rates.min() >= 0.9, RATES[rates.argmin()]
    assert (ends[:, 1] - ends[:, 0]).min() > 0.04 * 30 / max(items, 30)
    assert (np.diff(ends, axis=0) > 0).all()  # more that is right is never a lower interval


@pytest.mark.long
@pytest.mark.parametrize("items", [300, 500, 701, 1000, 1319, 2000])
def test_the_interval_of_a_rate_covers_it_on_many_items(items: int) -> None:
    test_the_interval_of_a_rate_covers_it_from_one_item_on(items)


@pytest.mark.parametrize("sizes", [[1, 1], [1, 1, 1], [2, 2], [2, 3], [1, 5], [3, 3, 3], [10, 3]])
@pytest.mark.parametrize("spread", [0.0, 0.1, 0.3])
def test_the_interval_of_a_mean_over_small_tasks_covers_it(sizes: list[int], spread: float) -> None:
    """Exactly, also where the tasks' rates differ."""
    outcomes = list(itertools.product(*[range(n + 1) for n in sizes]))
    found = [statistics.estimate([marks(k, n) for k, n in zip(right, sizes, strict=True)])[2:] for right in outcomes]
    low, high = np.asarray(found).T
    rates = []
    for rate in RATES[::5]:
        shares = np.clip(rate + spread * np.linspace(-1, 1, len(sizes)), 0, 1)
        parts = [stats.binom.pmf([o[i] for o in outcomes], n, shares[i]) for i, n in enumerate(sizes)]
        inside = (low <= shares.mean() + 1e-12) & (high >= shares.mean() - 1e-12)
        rates.append(float(np.prod(parts, axis=0)[inside].sum()))
    assert np.mean(rates) >= 0.94
    assert min(rates) >= 0.9


@pytest.mark.parametrize("seeds", [2, 3, 4, 5])
@pytest.mark.parametrize("items", [1, 2, 3, 5, 8, 30, 300, 2000])
def test_seeds_that_agree_know_no_more_than_one(items: int, seeds: int) -> None:
    """Their answers on an item are one answer: the items alone decide what is known."""
    for right in sorted({0, 1, items // 2, items - 1, items}):
        one, same = marks(right, items), np.repeat(marks(right, items), seeds, axis=0)
        single, several = statistics.estimate([one]), statistics.estimate([same])
        assert several.high - several.low >= single.high - single.low
        other = marks(items - right, items)[:, ::-1]
        pair, pairs = statistics.difference([one], [other]), statistics.difference([same], [other])
        assert pairs.high - pairs.low >= pair.high - pair.low > 0
        assert -1 <= pairs.low <= pairs.high <= 1


#: Items a task, of one task or several.
FEW = [[1], [2], [3], [5], [8], [16], [32], [200], [2000], [1, 1], [2, 5], [1] * 8, [5] * 8, [32, 100, 1000]]
SHARES = [0.5, 0.7, 0.9, 0.94, 0.97, 0.99, 1.0]


def repetitions(sizes: list[int], seeds: int) -> int:
    return 1000 // seeds if sum(sizes) <= 100 else 200


def covered(sizes: list[int], seeds: int, share: float, luck: float, mixed: bool, random: Generator) -> list[bool]:
    """Return, over repetitions, whether the truth lies in a run's interval and in that of a difference."""
    found = []
    for _ in range(repetitions(sizes, seeds)):
        easy = [random.choice([share, 1.0, max(0.0, 2 * share - 1)], size=n, p=[0.5, 0.25, 0.25]) for n in sizes]
        tasks = [each if mixed else np.full(len(each), share) for each in easy]
        one, other = ([seeds_of(random, seeds, task, luck) for task in tasks] for _ in range(2))
        own, both = statistics.estimate(one), statistics.difference(one, other)
        found += [own.low <= share <= own.high, both.low <= 0 <= both.high]
    return found


@pytest.mark.long
@pytest.mark.parametrize("seeds", [1, 2, 3, 4, 5])
def test_a_handful_of_items_is_told_apart_from_certainty(seeds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From one item on: at least 94 % on the mean, nowhere clearly below 90."""
    monkeypatch.setattr(statistics, "DRAWS", 10)  # the p-value's, which is not looked at
    random = np.random.default_rng(seeds)
    rates = {
        (tuple(sizes), share, luck, mixed): float(np.mean(covered(sizes, seeds, share, luck, mixed, random)))
        for sizes in FEW
        for share in SHARES
        for luck in ([0.0] if seeds == 1 else [0.0, 0.03])
        for mixed in (False, True)
    }
    assert np.mean([*rates.values()]) >= 0.94
    # 0.9 less two standard errors of so few repetitions, and a half for the smallest of many.
    room = {key: 2.5 * (0.09 / (2 * repetitions([*key[0]], seeds))) ** 0.5 for key in rates}
    assert {key: rate for key, rate in rates.items() if rate < 0.9 - room[key]} == {}


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
