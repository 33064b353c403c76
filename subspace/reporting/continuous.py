"""Paired differences of a continuous outcome over seeds crossed with items, and the power to find them.

Two methods are trained with the same seeds, hence on the same rows in the same order, and scored on the same items. So
their difference has one value an item and seed. Seeds and items are crossed, as in
:mod:`subspace.reporting.statistics`: a difference varies with the item (over all seeds), with the seed (over all
items), and by a rest. A *run* is a list with one array a task, ``(seeds, items)``; a mean weighs all tasks equally.

The interval is ``mean +- sqrt(t_i^2 V_i + t_s^2 V_s)``: V_i is the variance of the mean over items, V_s that over
seeds, each with Student's quantile for its own degrees of freedom. Both contain the rest, and a quantile for the sum of
two estimated variances is at most the larger one (J. Hajek (1962), Annals of Mathematical Statistics 33:713), so it
errs towards wide. In simulation it covers 94 % or more from two seeds on, where Satterthwaite's approximation falls
to 87 % if the seeds dominate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from subspace.reporting.statistics import ALPHA, LEVEL, POWER, Array, Run

#: Points at which the estimated variance over seeds is looked at, to average the power over it.
GRID = 400
#: More seeds than anybody trains: where so many do not suffice, the items are too few.
MOST_SEEDS = 1000
#: Degrees of freedom of a variance that is known.
MANY = 10**9


class MeanDifference(NamedTuple):
    """A difference of means, its standard error, interval, and p-value (null: no difference)."""

    value: float
    error: float
    low: float
    high: float
    p: float


class Spread(NamedTuple):
    """Variances of a paired difference: of an item over all seeds, of a seed over all items, and of the rest."""

    items: float
    seeds: float
    rest: float


class _Parts(NamedTuple):
    """Mean of a difference, and the variances of that mean by items and by seeds with their degrees of freedom."""

    value: float
    items: float
    df_items: int
    seeds: float
    df_seeds: int


def paired_difference(before: Run, after: Run) -> MeanDifference:
    """Return the mean of ``after - before``, runs of the same seeds on the same items.

    With one seed it holds for these two runs only. Where nothing is known of the spread, as with one item, the interval
    is unbounded.
    """
    parts = _parts([b - a for a, b in zip(before, after, strict=True)])
    return _tested(parts)


def paired_over_seeds(before: Sequence[float], after: Sequence[float], *, rounding: float = 0.0) -> MeanDifference:
    """Return the mean of ``after - before`` of numbers that are one a seed, as a validation loss is.

    If both are rounded alike to multiples of ``rounding``, as best rates to those of a ladder, seeds do not show that.
    """
    differences = np.asarray(after, dtype=float) - np.asarray(before, dtype=float)
    seeds = len(differences)
    variance = float(differences.var(ddof=1)) / seeds if seeds > 1 else 0.0
    known = rounding**2 / 6  # twice that of a uniform distribution
    return _tested(_Parts(float(differences.mean()), known, MANY if known else 0, variance, seeds - 1))


def spread(before: Run, after: Run) -> Spread:
    """Return the observed variances of a difference, by the two-way analysis of variance, as means over tasks."""
    return mean_spread([(before, after)])


def mean_spread(pairs: Sequence[tuple[Run, Run]]) -> Spread:
    """Return the mean over several differences of their observed variances.

    An estimate may fall below 0 where the truth is near. Their mean is cut off there, not each, which would raise it.
    """
    known = np.mean([_variances(before, after) for before, after in pairs], axis=0)
    return Spread(*np.maximum(0.0, known).tolist())


def _variances(before: Run, after: Run) -> tuple[float, float, float]:
    differences = [b - a for a, b in zip(before, after, strict=True)]
    seeds = len(differences[0])
    rest = float(np.mean([_rest(task) for task in differences]))
    of_items = float(np.mean([task.mean(0).var(ddof=1) if task.shape[1] > 1 else 0.0 for task in differences]))
    noise = rest * _share([task.shape[1] for task in differences])
    of_seeds = float(_seed_means(differences).var(ddof=1)) if seeds > 1 else 0.0
    return of_items - rest / seeds if seeds > 1 else of_items, of_seeds - noise, rest


def power_of(difference: float, known: Spread, items: Sequence[int], seeds: int, alpha: float = ALPHA) -> float:
    """Return the probability that :func:`paired_difference` finds a true difference, at this level.

    The mean is normal; the estimated variance over seeds is scaled chi-square and averaged over, that over items, of
    many degrees of freedom, is taken as known.

    Args:
        difference: the true one, in units of the outcome.
        known: the variances.
        items: the number of items of each task.
        seeds: the number of seeds.
        alpha: level of the two-sided test.
    """
    from scipy.special import chdtri, ndtr, stdtrit

    share, df = _share(items), sum(items) - len(items)
    by_items = (known.items + known.rest / seeds) * share
    by_seeds = (known.seeds + known.rest * share) / seeds
    true = math.sqrt(known.items * share + known.seeds / seeds + known.rest * share / seeds)
    if df < 1 or true == 0:
        return 1.0 if df >= 1 and difference else 0.0
    half = np.array([float(stdtrit(df, 1 - alpha / 2)) ** 2 * by_items])
    if seeds > 1:
        quantiles = chdtri(seeds - 1, 1 - (np.arange(GRID) + 0.5) / GRID) / (seeds - 1)
        half = half + float(stdtrit(seeds - 1, 1 - alpha / 2)) ** 2 * by_seeds * quantiles
    half = np.sqrt(half)
    return float(np.mean(ndtr((difference - half) / true) + ndtr((-difference - half) / true)))


def smallest_difference(
    known: Spread, items: Sequence[int], seeds: int, *, power: float = POWER, alpha: float = ALPHA
) -> float | None:
    """Return the smallest true difference that is found with this power; None if none is."""
    low, high = 0.0, math.sqrt(known.items + known.seeds + known.rest)
    for _ in range(60):
        if power_of(high, known, items, seeds, alpha) >= power:
            break
        high *= 2
    else:
        return None
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if power_of(middle, known, items, seeds, alpha) >= power else (middle, high)
    return high


def seeds_for(
    difference: float, known: Spread, items: Sequence[int], *, power: float = POWER, alpha: float = ALPHA
) -> int | None:
    """Return the fewest seeds, from two, with which a difference is found with this power; None if the items forbid."""
    if power_of(difference, known, items, MOST_SEEDS, alpha) < power:
        return None
    low, high = 1, MOST_SEEDS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power_of(difference, known, items, middle, alpha) >= power else (middle, high)
    return high


def _parts(differences: Sequence[Array]) -> _Parts:
    """Return mean and variances of a difference; with one seed, of the items alone."""
    tasks, seeds = len(differences), len(differences[0])
    value = float(np.mean([task.mean() for task in differences]))
    counts = [task.shape[1] for task in differences]
    df = sum(counts) - tasks if min(counts) > 1 else 0
    by_items = sum(float(task.mean(0).var(ddof=1)) / task.shape[1] for task in differences) / tasks**2 if df else 0.0
    by_seeds = float(_seed_means(differences).var(ddof=1)) / seeds if seeds > 1 else 0.0
    return _Parts(value, by_items, df, by_seeds, seeds - 1)


def _tested(parts: _Parts) -> MeanDifference:
    value, error = parts.value, math.sqrt(parts.items + parts.seeds)
    if not error:
        known = parts.df_items > 0 or parts.df_seeds > 0
        half = 0.0 if known and value == 0 else math.inf  # that nothing varied by chance is not known
        return MeanDifference(value, 0.0, value - half, value + half, 1.0)
    half = _half(parts, 1 - LEVEL)
    return MeanDifference(value, error, value - half, value + half, _p(parts))


def _half(parts: _Parts, alpha: float) -> float:
    from scipy.special import stdtrit

    pairs = ((parts.items, parts.df_items), (parts.seeds, parts.df_seeds))
    # By the lower tail: 1 - alpha / 2 is 1 for small levels, whose quantile is infinite.
    return math.sqrt(sum(float(stdtrit(df, alpha / 2)) ** 2 * variance for variance, df in pairs if df > 0))


def _p(parts: _Parts) -> float:
    """Return the level at which the interval would end at 0."""
    low, high = -80.0, 0.0  # of the logarithm: the interval at the level e^low is wider than that at e^high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _half(parts, math.exp(middle)) > abs(parts.value) else (low, middle)
    return math.exp(high)


def _share(items: Sequence[int]) -> float:
    """Return the variance of a mean over tasks of items of variance 1."""
    return sum(1 / count for count in items) / len(items) ** 2


def _seed_means(differences: Sequence[Array]) -> Array:
    return np.asarray(np.mean([task.mean(1) for task in differences], axis=0))


def _rest(task: Array) -> float:
    """Return the mean square that neither seeds nor items explain; 0 where it cannot be told from them."""
    seeds, items = task.shape
    if seeds < 2 or items < 2:
        return 0.0
    rest = task - task.mean(0) - task.mean(1, keepdims=True) + task.mean()
    return float((rest**2).sum() / ((seeds - 1) * (items - 1)))
