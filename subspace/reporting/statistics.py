"""Confidence intervals, paired significance tests and power analysis of scores.

Runs are scored on the same items, so everything between runs is paired by item. A *run* is a list with one array of 0
and 1 a task, ``(seeds, items)``: what each seed got right. Several seeds share their items, so seeds and items are
crossed, not nested: an item that is hard is hard for every seed, and drawing items anew for each seed would count the
same item several times. Tasks are strata: each keeps its number of items, and a mean over tasks weighs them alike.
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
# What share of items two runs answer differently (one right, one wrong), before that is known.
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
    """How much more one run got right than another, and the p-value of there being no difference."""

    value: float
    error: float
    low: float
    high: float
    p: float
    lost: float  # items, on average over seeds, that only the first run got right
    gained: float


def estimate(run: Run) -> Estimate:
    """Return the unweighted mean over tasks of the share of items that are right.

    One seed: the standard error is the stratified binomial one, sqrt(sum(p (1 - p) / n)) / k, and the interval Wilson's
    at the number of items of equal standard error (E. Korn, B. Graubard (1998), Survey Methodology 24:193, with the
    score interval). For one task that is Wilson's own. Several seeds: the hierarchical bootstrap's, which is about the
    method, not about these seeds.
    """
    if len(run[0]) > 1:
        found = _hierarchical([(run, 1)])
        return Estimate(found.value, found.error, max(0.0, found.low), min(1.0, found.high))
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
    """Return by how much the mean over tasks differs between two runs on the same items.

    One seed each: the paired bootstrap's interval; the p-value is McNemar's, over several tasks its stratified form.
    More seeds in either: the hierarchical bootstrap's interval, and Student's t by its standard error.
    """
    found = _hierarchical([(before, -1), (after, 1)], draws)
    pairs = [(one.mean(0), other.mean(0)) for one, other in zip(before, after, strict=True)]
    lost = [float((one * (1 - other)).sum()) for one, other in pairs]
    gained = [float(((1 - one) * other).sum()) for one, other in pairs]
    if len(before[0]) > 1 or len(after[0]) > 1:
        p = _student(found)
    elif len(pairs) == 1:
        p = mcnemar(round(lost[0]), round(gained[0]))
    else:
        p = _flips([round(n) for n in lost], [round(n) for n in gained], [len(one) for one, _ in pairs])
    return Difference(found.value, found.error, found.low, found.high, p, sum(lost), sum(gained))


def mcnemar(lost: int, gained: int) -> float:
    """Return the exact two-sided p-value of two runs that differ on ``lost`` + ``gained`` items.

    Q. McNemar (1947), Psychometrika 12:153; exact: the smaller count is binomial with probability 1/2.
    """
    from scipy.special import bdtr

    return min(1.0, 2 * float(bdtr(min(lost, gained), lost + gained, 0.5)))


def _flips(lost: Sequence[int], gained: Sequence[int], items: Sequence[int]) -> float:
    """Return the p-value of the mean over tasks by randomization: McNemar's test, in strata.

    Where two runs are alike, whichever of them got a discordant item right might as well have been the other (R. Fisher
    (1935), The Design of Experiments, section 21). A draw goes through all discordant items of all tasks.
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
    """Return the smallest true difference of the mean over tasks that two runs on these items show with this power.

    R. Connor (1987), Biometrics 43:207, solved for the difference d: for one task of n items, of which the runs answer
    a share psi differently, sqrt(n) d = z_alpha sqrt(psi) + z_power sqrt(psi - d^2). Over k tasks, psi / n becomes
    sum(psi / n) / k^2, and d^2 / n likewise. A difference needs at least as much discordance: where d would be larger
    than psi, psi is d.

    Args:
        items: how many items each task has.
        discordance: the share of items that the runs answer differently, for each task or for all.
        power: the probability of telling the runs apart.
        alpha: the probability of telling runs apart that are alike, two-sided.

    Returns:
        The difference as a share; None where no difference would be seen.
    """
    k = len(items)
    psi = [discordance] * k if isinstance(discordance, int | float) else list(discordance)
    weight = sum(1 / n for n in items) / k**2
    a, b = _z(1 - alpha), NormalDist().inv_cdf(power)

    def solve(variance: float) -> float:
        root = a**2 * variance - (1 + b**2 * weight) * (a**2 - b**2) * variance
        return (a * math.sqrt(variance) + math.sqrt(max(root, 0.0))) / (1 + b**2 * weight)

    found = solve(sum(share / n for share, n in zip(psi, items, strict=True)) / k**2)
    if found > sum(psi) / k:
        # psi = d in the equation above gives sqrt(d / weight) = a + b sqrt(1 - d): the right side falls with d.
        low, high = 0.0, 1.0
        for _ in range(60):
            found = (low + high) / 2
            low, high = (found, high) if math.sqrt(found / weight) < a + b * math.sqrt(1 - found) else (low, found)
    return found if found < 1 - 1e-9 else None


def power_statement(items: Mapping[str, int]) -> str:
    """Say before a scoring what it will be able to tell apart; ``items`` is how many each task has, by its title."""
    found = {name: detectable_difference([n]) for name, n in items.items()}
    if len(items) > 1:
        found["their mean"] = detectable_difference(list(items.values()))
    each = ", ".join(f"{name} {'none' if share is None else f'{100 * share:.1f}'}" for name, share in found.items())
    return (
        f"smallest true difference between two runs that shows on these items, in points: {each} (paired, power "
        f"{100 * POWER:.0f} %, alpha {100 * ALPHA:.0f} %, if {100 * ASSUMED_DISCORDANCE:.0f} % of the answers differ)"
    )


def detectable_between(before: Run, after: Run) -> float | None:
    """Return the smallest true difference that these two runs would show, at the discordance that they have."""
    if len(before[0]) == len(after[0]) == 1:
        pairs = zip(before, after, strict=True)
        return detectable_difference(
            [task.size for task in before], [float((one != other).mean()) for one, other in pairs]
        )
    from scipy.special import stdtrit

    found = _hierarchical([(before, -1), (after, 1)])
    return float((stdtrit(found.df, 1 - ALPHA / 2) + stdtrit(found.df, POWER)) * found.error)


class _Found(NamedTuple):
    value: float
    error: float
    low: float
    high: float
    df: float


def _hierarchical(runs: Sequence[tuple[Run, int]], draws: int = DRAWS) -> _Found:
    """Bootstrap the signed sum of runs' means over tasks: first seeds, then items, which all runs and seeds share.

    Drawing both as they are would count the part of the variance that is neither a seed's nor an item's three times
    (A. Owen (2007), Annals of Applied Statistics 1:386). So what is drawn of a seed is its deviation from the mean,
    rescaled to the variance of the seeds alone (J. Carpenter, H. Goldstein, J. Rasbash (2003), Applied Statistics
    52:431), which the two-way analysis of variance gives; what is drawn of an item is its mean over seeds, which
    carries the rest.

    With one seed in every run the interval is the bootstrap's percentiles. A few seeds are too few for percentiles:
    there it is Student's t with the bootstrap's standard error and the degrees of freedom of F. Satterthwaite (1946),
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
        # A mean over few seeds has few values: how often each is drawn is all that a draw of n items comes to.
        values, counts = np.unique(means, return_counts=True)
        drawn += (random.multinomial(n, counts / n, size=draws) @ values / n - means.mean()) / k

    # The parts of the variance, with their degrees of freedom.
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
            # Simulation covers 95 % by neither: as observed the seeds get too much weight, alone too little.
            parts.append((math.sqrt(observed * max(alone, 0.0)) / seeds, seeds - 1))

    error = float(drawn.std())
    if len(parts) == 1:
        low, high = np.quantile(value + drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return _Found(value, error, float(low), float(high), math.inf)
    from scipy.special import stdtrit

    if error == 0:
        return _Found(value, error, value, value, math.inf)
    df = error**4 / sum(variance**2 / freedom for variance, freedom in parts)
    half = float(stdtrit(df, (1 + LEVEL) / 2)) * error
    return _Found(value, error, value - half, value + half, df)


def _student(found: _Found) -> float:
    from scipy.special import stdtr

    return 2 * float(stdtr(found.df, -abs(found.value) / found.error)) if found.error else float(found.value == 0)


def _seed_means(run: Run) -> Array:
    return np.asarray(np.mean([task.mean(1) for task in run], axis=0))


def _interaction(task: Array) -> float:
    """Return the mean square of what is neither the seed's nor the item's, of the two-way analysis of variance."""
    seeds, items = task.shape
    rest = task - task.mean(0) - task.mean(1, keepdims=True) + task.mean()
    return float((rest**2).sum() / (max(seeds - 1, 1) * max(items - 1, 1)))


def _z(level: float) -> float:
    return float(NormalDist().inv_cdf((1 + level) / 2))
