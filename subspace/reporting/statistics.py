"""Confidence intervals, paired significance tests and power analysis of scores.

Runs are scored on the same items, so all comparisons of runs are paired by item. A *run* is a list with one array of 0
and 1 a task, ``(seeds, items)``: whether each seed's answer is correct. The seeds share their items, so seeds and items
are crossed, not nested: a hard item is hard for every seed, and resampling items separately for each seed would count
the same item repeatedly. Tasks are strata: each keeps its number of items, and a mean weighs all tasks equally.

Where all items agree, their variance is zero, but not what is unknown. So the interval of one run on one task is an
exact one, and others count a few made-up items at either end of the scale besides: together as many whatever the number
of tasks. They never have width zero, never leave the scale, and cover the truth from one item on
(``tests/reporting/test_statistics.py``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

LEVEL, POWER, ALPHA = 0.95, 0.8, 0.05
#: Draws of the randomisation test over several tasks.
DRAWS = 20_000
# Share of items that only one of two runs answers correctly, assumed before it is known.
ASSUMED_DISCORDANCE = 0.15

Array = npt.NDArray[np.float64]
Run = Sequence[Array]


class Estimate(NamedTuple):
    """A number, its standard error, and its interval at ``LEVEL``."""

    value: float
    error: float
    low: float
    high: float


class Difference(NamedTuple):
    """Difference of the accuracies of two runs, its standard error, interval, and p-value (null: no difference)."""

    value: float
    error: float
    low: float
    high: float
    p: float
    lost: float  # number of items that only the first run answered correctly, averaged over seeds
    gained: float  # the same for the second run


def estimate(run: Run) -> Estimate:
    """Return the accuracy, as an unweighted mean over tasks, with its standard error and interval.

    One task and one seed: the interval is :func:`mid_p`. Otherwise it is that of A. Agresti, B. Coull (1998), The
    American Statistician 52:119, for strata: z^2 / 2 items made up at either end. Several seeds: it holds for the
    method, not only for these seeds; see :func:`_interval`.
    """
    value, error = _value(run), _error([(run, 1)])
    if len(run) == 1 and len(run[0]) == 1:
        return Estimate(value, error, *mid_p(int(run[0].sum()), run[0].size))
    return Estimate(value, error, *_interval([(run, 1)], (0.0, 1.0), _z(LEVEL) ** 2 / 2)[:2])


def mid_p(right: int, items: int, level: float = LEVEL) -> tuple[float, float]:
    """Return the mid-P interval of a share: G. Berry, P. Armitage (1995), The Statistician 44:417.

    Its ends are the shares at which results further off, and half of the observed one, have probability (1 - level) /
    2. Over all shares and numbers of items it covers at least 91 %; Wilson's and Agresti and Coull's fall to 83 % for
    shares near 1, where models on easy suites are.
    """
    from scipy.special import betainc

    def solve(tail: float) -> float:
        low, high = 0.0, 1.0
        for _ in range(60):
            share = (low + high) / 2
            at_least = betainc(right, items - right + 1, share) if right else 1.0
            above = betainc(right + 1, items - right, share) if right < items else 0.0
            low, high = (share, high) if (at_least + above) / 2 < tail else (low, share)
        return (low + high) / 2

    tail = (1 - level) / 2
    return (solve(tail) if right else 0.0), (solve(1 - tail) if right < items else 1.0)


def seed_spread(run: Run) -> float | None:
    """Return the standard deviation over seeds of the mean over tasks; None with one seed."""
    return float(_seed_means(run).std(ddof=1)) if len(run[0]) > 1 else None


def difference(before: Run, after: Run) -> Difference:
    """Return the difference (``after`` - ``before``) of the mean over tasks of two runs on the same items.

    The interval is that of D. Bonett, R. Price (2012), Journal of Educational and Behavioral Statistics 37:479, for
    strata: one item made up that only the first run answers, and one that only the second does. One seed each: the
    p-value is McNemar's, over several tasks its stratified form. More seeds in either: Student's t, as the interval.
    """
    runs = [(before, -1), (after, 1)]
    value = _value(after) - _value(before)
    error = _error(runs)
    low, high, p = _interval(runs, (-1.0, 1.0), 1.0)
    pairs = [(first.mean(0), second.mean(0)) for first, second in zip(before, after, strict=True)]
    lost = [float((first * (1 - second)).sum()) for first, second in pairs]
    gained = [float(((1 - first) * second).sum()) for first, second in pairs]
    if len(before[0]) == len(after[0]) == 1:
        down, up = [round(n) for n in lost], [round(n) for n in gained]
        p = mcnemar(*down, *up) if len(pairs) == 1 else _stratified_mcnemar(down, up, [len(a) for a, _ in pairs])
    return Difference(value, error, low, high, p, sum(lost), sum(gained))


def mcnemar(lost: int, gained: int) -> float:
    """Return the exact two-sided p-value of two runs that differ on ``lost`` + ``gained`` items.

    Q. McNemar (1947), Psychometrika 12:153; exact: the smaller count is binomial with probability 1/2.
    """
    from scipy.special import bdtr

    return min(1.0, 2 * float(bdtr(min(lost, gained), lost + gained, 0.5)))


def _stratified_mcnemar(lost: Sequence[int], gained: Sequence[int], items: Sequence[int]) -> float:
    """Return the p-value of the mean over tasks by a randomisation test: McNemar's test, in strata.

    If two runs are equally good, either is equally likely to be the one that answers a discordant item correctly (R.
    Fisher (1935), The Design of Experiments, section 21). A draw reassigns all discordant items of all tasks.
    """
    random = np.random.default_rng(0)
    drawn, observed = np.zeros(DRAWS), 0.0
    for down, up, n in zip(lost, gained, items, strict=True):
        drawn += (2 * random.binomial(down + up, 0.5, size=DRAWS) - (down + up)) / n
        observed += (up - down) / n
    return (1 + int((np.abs(drawn) >= abs(observed) - 1e-9).sum())) / (DRAWS + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number: S. Holm (1979), Scandinavian Journal of Statistics 6:65."""
    corrected, worst = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = worst
    return corrected


def detectable_difference(
    items: Sequence[int],
    discordance: Sequence[float] | float = ASSUMED_DISCORDANCE,
    *,
    power: float = POWER,
    alpha: float = ALPHA,
) -> float | None:
    """Return the smallest true difference of the mean over tasks that is detected on these items with this power.

    R. Connor (1987), Biometrics 43:207, solved for the difference d: for one task of n items, of which the runs answer
    a share psi differently, sqrt(n) d = z_alpha sqrt(psi) + z_power sqrt(psi - d^2). Over k tasks, psi / n becomes
    sum(psi / n) / k^2, and d^2 / n likewise. A difference needs at least as much discordance: where d would be larger
    than psi, psi is d.

    Args:
        items: number of items of each task.
        discordance: share of items that only one of the runs answers correctly, for each task or for all.
        power: probability of detecting the difference.
        alpha: significance level of the two-sided test.

    Returns:
        The difference, between 0 and 1; None if no difference would be detected.
    """
    k = len(items)
    psi = [discordance] * k if isinstance(discordance, int | float) else list(discordance)
    weight = sum(1 / n for n in items) / k**2
    a, b = _z(1 - alpha), NormalDist().inv_cdf(power)

    def solve(variance: float) -> float:
        root = a**2 * variance - (1 + b**2 * weight) * (a**2 - b**2) * variance
        return (a * math.sqrt(variance) + math.sqrt(max(root, 0.0))) / (1 + b**2 * weight)

    smallest = solve(sum(share / n for share, n in zip(psi, items, strict=True)) / k**2)
    if smallest > sum(psi) / k:
        # psi = d in the equation above gives sqrt(d / weight) = a + b sqrt(1 - d): the right side falls with d.
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = smallest = (low + high) / 2
            low, high = (middle, high) if math.sqrt(middle / weight) < a + b * math.sqrt(1 - middle) else (low, middle)
    return smallest if smallest < 1 - 1e-9 else None


def power_statement(items: Mapping[str, int]) -> str:
    """Return a sentence on the differences that a scoring will detect; ``items`` maps task titles to item counts."""
    smallest = {name: detectable_difference([n]) for name, n in items.items()}
    if len(items) > 1:
        smallest["their mean"] = detectable_difference(list(items.values()))
    each = ", ".join(f"{name} {'none' if share is None else f'{100 * share:.1f}'}" for name, share in smallest.items())
    return (
        f"smallest true difference between two runs that shows on these items, in points: {each} (paired, power "
        f"{100 * POWER:.0f} %, alpha {100 * ALPHA:.0f} %, if {100 * ASSUMED_DISCORDANCE:.0f} % of the answers differ)"
    )


def detectable_between(before: Run, after: Run) -> float | None:
    """Return the smallest detectable difference of these two runs, at their observed discordance."""
    if len(before[0]) == len(after[0]) == 1:
        pairs = zip(before, after, strict=True)
        return detectable_difference(
            [task.size for task in before], [float((first != second).mean()) for first, second in pairs]
        )
    from scipy.special import stdtrit

    variances = _variances([(before, -1), (after, 1)], (-1.0, 1.0), 1.0)
    df, error = _freedom(variances), math.sqrt(sum(variance for variance, _ in variances))
    smallest = float((stdtrit(df, 1 - ALPHA / 2) + stdtrit(df, POWER)) * error)
    return smallest if smallest < 1 else None


Signed = Sequence[tuple[Run, int]]
"""Runs on the same items, each with 1 or -1: what is estimated is the signed sum of their means."""


def _interval(runs: Signed, scale: tuple[float, float], made_up: float) -> tuple[float, float, float]:
    """Return the ends of an interval, and the two-sided p-value of the signed sum of means being 0.

    It is Student's t about the mean with the made-up items, with the degrees of freedom of F. Satterthwaite (1946),
    Biometrics Bulletin 2:110; with one task and one seed in every run it is normal.

    Args:
        runs: the runs.
        scale: the smallest and the largest value of an item.
        made_up: number of items made up at either end of the scale, over all tasks.
    """
    from scipy.special import stdtr, stdtrit

    variances = _variances(runs, scale, made_up)
    error, df = math.sqrt(sum(variance for variance, _ in variances)), _freedom(variances)
    k = len(runs[0][0])
    center = sum(
        (means.sum() + made_up / k * sum(scale)) / (len(means) + 2 * made_up / k) for means in _item_means(runs)
    )
    center = float(center) / k
    half = float(stdtrit(df, (1 + LEVEL) / 2)) * error
    return max(scale[0], center - half), min(scale[1], center + half), 2 * float(stdtr(df, -abs(center) / error))


def _error(runs: Signed) -> float:
    """Return the standard error of the signed sum of means, by the two-way analysis of variance."""
    seeds = sum(_seed_variances(run)[1] / len(run[0]) for run, _ in runs)
    return math.sqrt(_variances(runs, (0.0, 0.0), 0.0)[0][0] + seeds)


def _variances(runs: Signed, scale: tuple[float, float], made_up: float) -> list[tuple[float, float]]:
    """Return the components of the variance of the signed sum of means, with their degrees of freedom.

    The first is of the items, which runs and seeds share: of their means over seeds, which include the residual. One
    follows for each run of several seeds.
    """
    k = len(runs[0][0])
    of_items, freedom = 0.0, 0.0
    for means in _item_means(runs):
        n = len(means) + 2 * made_up / k
        center = (means.sum() + made_up / k * sum(scale)) / n
        squares = (means**2).sum() + made_up / k * (scale[0] ** 2 + scale[1] ** 2)
        of_items += max(0.0, float(squares / n - center**2)) / n / k**2
        freedom += len(means) - 1
    seeds_of = {len(run[0]) for run, _ in runs}
    # Of one task and seed the made-up items stand for what a t distribution would allow for.
    parts = [(of_items, max(1.0, freedom) if seeds_of != {1} or k > 1 else math.inf)]
    for run, _ in runs:
        if (seeds := len(run[0])) > 1:
            # In simulation neither variance gives 95 % coverage: the observed one weighs the seeds too much, their own
            # too little. Hence the geometric mean.
            parts.append((math.sqrt(math.prod(_seed_variances(run))) / seeds, seeds - 1))
    return parts


def _seed_variances(run: Run) -> tuple[float, float]:
    """Return the variance over seeds of a run's mean, as observed and of the seeds alone.

    The observed one includes the residual, which the items' does, too, and which would be counted twice (A. Owen
    (2007), Annals of Applied Statistics 1:386).
    """
    if len(run[0]) == 1:
        return 0.0, 0.0
    observed = float(_seed_means(run).var(ddof=1))
    residual = sum(_interaction(task) / task.shape[1] for task in run) / len(run) ** 2
    return observed, max(0.0, observed - residual)


def _freedom(variances: Sequence[tuple[float, float]]) -> float:
    total = sum(variance for variance, _ in variances)
    spread = sum(variance**2 / freedom for variance, freedom in variances)
    return total**2 / spread if spread else math.inf


def _item_means(runs: Signed) -> Iterator[Array]:
    """Yield for each task its items' signed sums of means over seeds."""
    for task in range(len(runs[0][0])):
        yield np.asarray(sum(sign * run[task].mean(0) for run, sign in runs))


def _value(run: Run) -> float:
    return float(np.mean([task.mean() for task in run]))


def _seed_means(run: Run) -> Array:
    return np.asarray(np.mean([task.mean(1) for task in run], axis=0))


def _interaction(task: Array) -> float:
    """Return the residual (seed by item) mean square of the two-way analysis of variance."""
    seeds, items = task.shape
    rest = task - task.mean(0) - task.mean(1, keepdims=True) + task.mean()
    return float((rest**2).sum() / (max(seeds - 1, 1) * max(items - 1, 1)))


def _z(level: float) -> float:
    return float(NormalDist().inv_cdf((1 + level) / 2))
