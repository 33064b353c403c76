"""Confidence intervals, paired significance tests and power analysis of scores.

Runs are scored on the same items, so all comparisons of runs are paired by item. A *run* is a list with one array of 0
and 1 a task, ``(seeds, items)``: whether each seed's answer is correct. The seeds share their items, so seeds and items
are crossed, not nested: a hard item is hard for every seed, and resampling items separately for each seed would count
the same item repeatedly. Tasks are strata: each keeps its number of items, and a mean weighs all tasks equally.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

LEVEL, POWER, ALPHA = 0.95, 0.8, 0.05
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

    One seed: the standard error is the stratified binomial one, sqrt(sum(p (1 - p) / n)) / k, and the interval Wilson's
    at the number of items of equal standard error (E. Korn, B. Graubard (1998), Survey Methodology 24:193, with the
    score interval). For one task that is Wilson's own. Several seeds: the hierarchical bootstrap's, which holds for the
    method, not only for these seeds.
    """
    if len(run[0]) > 1:
        bootstrap = _hierarchical([(run, 1)])
        return Estimate(bootstrap.value, bootstrap.error, max(0.0, bootstrap.low), min(1.0, bootstrap.high))
    shares, k = [float(task.mean()) for task in run], len(run)
    value = sum(shares) / k
    variance = sum(p * (1 - p) / task.size for p, task in zip(shares, run, strict=True)) / k**2
    items = value * (1 - value) / variance if variance else k**2 / sum(1 / task.size for task in run)
    return Estimate(value, math.sqrt(variance), *wilson(value, items))


def wilson(share: float, items: float, level: float = LEVEL) -> tuple[float, float]:
    """Return the score interval of a share of items.

    E. B. Wilson (1927), JASA 22:209; recommended by L. Brown, T. Cai, A. DasGupta (2001), Statistical Science 16:101.
    """
    z = _z(level)
    center = (share + z**2 / (2 * items)) / (1 + z**2 / items)
    half = z / (1 + z**2 / items) * math.sqrt(share * (1 - share) / items + z**2 / (4 * items**2))
    return (0.0 if share == 0 else center - half), (1.0 if share == 1 else center + half)


def seed_spread(run: Run) -> float | None:
    """Return the standard deviation over seeds of the mean over tasks; None with one seed."""
    return float(_seed_means(run).std(ddof=1)) if len(run[0]) > 1 else None


def difference(before: Run, after: Run, draws: int = DRAWS) -> Difference:
    """Return the difference (``after`` - ``before``) of the mean over tasks of two runs on the same items.

    One seed each: the paired bootstrap's interval; the p-value is McNemar's, over several tasks its stratified form.
    More seeds in either: the hierarchical bootstrap's interval, and Student's t by its standard error.
    """
    bootstrap = _hierarchical([(before, -1), (after, 1)], draws)
    pairs = [(first.mean(0), second.mean(0)) for first, second in zip(before, after, strict=True)]
    lost = [float((first * (1 - second)).sum()) for first, second in pairs]
    gained = [float(((1 - first) * second).sum()) for first, second in pairs]
    if len(before[0]) > 1 or len(after[0]) > 1:
        p = _student(bootstrap)
    elif len(pairs) == 1:
        p = mcnemar(round(lost[0]), round(gained[0]))
    else:
        p = _stratified_mcnemar([round(n) for n in lost], [round(n) for n in gained], [len(a) for a, _ in pairs])
    value, error, low, high, _ = bootstrap
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

    bootstrap = _hierarchical([(before, -1), (after, 1)])
    return float((stdtrit(bootstrap.df, 1 - ALPHA / 2) + stdtrit(bootstrap.df, POWER)) * bootstrap.error)


class _Bootstrap(NamedTuple):
    value: float
    error: float
    low: float
    high: float
    df: float


def _hierarchical(runs: Sequence[tuple[Run, int]], draws: int = DRAWS) -> _Bootstrap:
    """Return the bootstrap of the signed sum of runs' means, over seeds and over items, which runs and seeds share.

    Resampling both directly would count the residual variance, which is neither the seeds' nor the items', three times
    (A. Owen (2007), Annals of Applied Statistics 1:386). So a drawn seed contributes its deviation from the mean,
    rescaled to the variance of the seeds alone (J. Carpenter, H. Goldstein, J. Rasbash (2003), Applied Statistics
    52:431), which the two-way analysis of variance gives; a drawn item contributes its mean over seeds, which includes
    the residual.

    With one seed in every run the interval is the bootstrap's percentiles. With a few seeds percentiles are unreliable,
    so it is Student's t with the bootstrap's standard error and the degrees of freedom of F. Satterthwaite (1946),
    Biometrics Bulletin 2:110.
    """
    k = len(runs[0][0])
    random = np.random.default_rng(0)
    value = sum(sign * float(_seed_means(run).mean()) for run, sign in runs)

    drawn, item_variance = np.zeros(draws), 0.0
    for task in range(k):
        means = np.sum([sign * run[task].mean(0) for run, sign in runs], axis=0)
        n = len(means)
        item_variance += float(means.var()) / n / k**2
        # A mean over few seeds has few distinct values, so a draw of n items reduces to the count of each value.
        values, counts = np.unique(means, return_counts=True)
        drawn += (random.multinomial(n, counts / n, size=draws) @ values / n - means.mean()) / k

    # The components of the variance, with their degrees of freedom.
    parts = [(item_variance, max(1, sum(task.shape[1] - 1 for task in runs[0][0])))]
    for run, sign in runs:
        seeds = len(run[0])
        if seeds > 1:
            deviations = _seed_means(run) - _seed_means(run).mean()
            observed = float(deviations.var(ddof=1))
            alone = observed - sum(_interaction(task) / task.shape[1] for task in run) / k**2
            if alone > 1e-12:
                deviations *= math.sqrt(alone / float(deviations.var()))
                drawn += sign * deviations[random.integers(seeds, size=(draws, seeds))].mean(1)
            # In simulation neither variance gives 95 % coverage: the observed one weighs the seeds too much, their own
            # too little. Hence the geometric mean.
            parts.append((math.sqrt(observed * max(alone, 0.0)) / seeds, seeds - 1))

    error = float(drawn.std())
    if len(parts) == 1:
        low, high = np.quantile(value + drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return _Bootstrap(value, error, float(low), float(high), math.inf)
    from scipy.special import stdtrit

    if error == 0:
        return _Bootstrap(value, error, value, value, math.inf)
    df = error**4 / sum(variance**2 / freedom for variance, freedom in parts)
    half = float(stdtrit(df, (1 + LEVEL) / 2)) * error
    return _Bootstrap(value, error, value - half, value + half, df)


def _student(b: _Bootstrap) -> float:
    """Return the two-sided p-value of Student's t test by the bootstrap's standard error."""
    from scipy.special import stdtr

    return 2 * float(stdtr(b.df, -abs(b.value) / b.error)) if b.error else float(b.value == 0)


def _seed_means(run: Run) -> Array:
    return np.asarray(np.mean([task.mean(1) for task in run], axis=0))


def _interaction(task: Array) -> float:
    """Return the residual (seed by item) mean square of the two-way analysis of variance."""
    seeds, items = task.shape
    rest = task - task.mean(0) - task.mean(1, keepdims=True) + task.mean()
    return float((rest**2).sum() / (max(seeds - 1, 1) * max(items - 1, 1)))


def _z(level: float) -> float:
    return float(NormalDist().inv_cdf((1 + level) / 2))
